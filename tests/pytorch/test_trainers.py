"""Trainers of others: Hugging Face's and Lightning's."""

import copy

import pytest

import lopt

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from lopt.torch import LearnedOptimizer  # noqa: E402

# Adam is Optax's.
pytestmark = pytest.mark.standard_promotion

STEPS = 12


@pytest.fixture
def language(tmp_path, monkeypatch):
    """A tiny model, without a download, and a function that trains it with a `Trainer`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    words = torch.arange(16)[:, None] + torch.arange(8)
    rows = [{"input_ids": row % 11, "labels": row % 11} for row in words]

    def trained(model, steps=STEPS, resume=None, **options):
        arguments = transformers.TrainingArguments(
            tmp_path / "run",
            max_steps=steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="constant",
            weight_decay=0.06,
            max_grad_norm=1.0,
            save_steps=6,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            seed=0,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, **options)
        trainer.train(resume_from_checkpoint=resume)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    return model, trained, tmp_path / "run"


def test_hugging_face_by_class(language):
    model, trained, folder = language
    options = {"optimizer_cls_and_kwargs": (LearnedOptimizer, {"num_steps": STEPS})}
    start = copy.deepcopy(model.state_dict())
    losses = trained(model, **options)
    assert losses[-1] < 0.7 * losses[0]
    # Resumed in the middle, it ends where it did.
    end = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    again = trained(model, resume=folder / "checkpoint-6", **options)
    assert again[-1] == losses[-1]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, end[name]), name


def test_hugging_face_by_optimizer_and_schedule(language):
    model, trained, _ = language
    optimizer = LearnedOptimizer.for_module(model, lr=0.05)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    losses = trained(model, optimizers=(optimizer, scheduler))
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*num_workers", "ignore:.*log_every")
@pytest.mark.parametrize("name", ["lopt-1", pytest.param("velo_small", marks=pytest.mark.slow)])
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip("lightning")
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long())
    rule = name if name == "lopt-1" else lopt.velo_small()
    losses = []

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = LearnedOptimizer.for_module(self, rule, num_steps=STEPS)
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        gradient_clip_val=1.0,
    )
    model = Classifier()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=32))
    assert len(losses) == STEPS
    assert losses[-1] != losses[0]
    if name == "lopt-1":
        assert losses[-1] < 0.5 * losses[0]
    # The file has the optimizer's state.
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    found = torch.load(tmp_path / "end.ckpt", weights_only=True)["optimizer_states"][0]
    fresh = Classifier()
    optimizer = LearnedOptimizer.for_module(fresh, rule, num_steps=STEPS)
    optimizer.load_state_dict(found)
    for a, b in zip(fresh.parameters(), model.parameters(), strict=True):
        for key, tensor in optimizer.state[a].items():
            assert torch.equal(tensor, trainer.optimizers[0].state[b][key])
