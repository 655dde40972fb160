"""``python -m mirage``: the command line, where ``mirage`` itself is not on the path, or of another Python."""

from mirage.cli import main

if __name__ == "__main__":
    main(prog_name="mirage")
