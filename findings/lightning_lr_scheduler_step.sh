#!/usr/bin/env bash
# lightning 2.6.6: lr_scheduler_step as its docstring has it for a scheduler that "requires an epoch value",
# scheduler.step(epoch=self.current_epoch), makes every rate come one epoch late. The hook runs at the end of an epoch,
# when current_epoch still is the one that ended, so that epoch 1 trains at the rate of epoch 0 again, and with a
# warm-up from 0 the first two epochs change no weight. The default, step() without a number, and current_epoch + 1 are
# on time.
# Matters here: released trainers of all-in-one restoration (PromptIR's) have the hook in this form and a warm-up from
# 0; to repeat their runs the lag has to be repeated, which the schedule of the released preset does.
#
# Seen, rates of epochs 0 to 4 for a rate of epoch / 10:
#
#     default 0.0 0.1 0.2 0.3 0.4, as documented 0.0 0.0 0.1 0.2 0.3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 lightning==2.6.6
cd "$folder"
venv/bin/python - 2> errors <<'PYTHON' || { cat errors; exit 1; }
import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    """A weight, and the rate that each epoch trains it with."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.rates = []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: epoch / 10)]

    def on_train_epoch_start(self):
        self.rates.append(round(self.optimizers().param_groups[0]["lr"], 6))

    def training_step(self, batch, index):
        return self.layer(batch[0]).square().mean()


class AsDocumented(Net):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(epoch=self.current_epoch)


class OneMore(Net):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(epoch=self.current_epoch + 1)


quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
rates = {}
for kind in (Net, AsDocumented, OneMore):
    net = kind()
    data = DataLoader(TensorDataset(torch.ones(2, 1)), batch_size=1)
    Trainer(max_epochs=5, accelerator="cpu", **quiet).fit(net, data)
    rates[kind.__name__] = net.rates
print("lightning", lightning.__version__, "torch", torch.__version__, rates)
on_time = [0.0, 0.1, 0.2, 0.3, 0.4]
assert rates["Net"] == on_time and rates["OneMore"] == on_time
assert rates["AsDocumented"] == [0.0, 0.0, 0.1, 0.2, 0.3], "changed: the rates are on time"
PYTHON
