"""What every operator stands on: which implementation runs, registration with PyTorch, argument checks, tuning."""
