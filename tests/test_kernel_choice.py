"""
The choice of the attention kernel: the fastest one that is right here, found by trying it.

A failure means that a kernel that computes wrongly on some machine would train a model wrongly, or that a named kernel is
silently replaced by another.
"""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_fpdt import kernel_choice
from hf_fpdt.attention_kernels import NaiveKernel
from hf_fpdt.kernel_choice import KERNELS, choose_kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_remembered_choice():
    choose_kernel.cache_clear()
    yield
    choose_kernel.cache_clear()


def choose(name="auto", dtype=torch.float32, head_dim=16, value_dim=16):
    return choose_kernel(name, CPU, dtype, head_dim, value_dim)


class _Fake(NaiveKernel):
    """Sits where torch_flash is, ahead of torch_cpu, and claims to run anything."""

    name = "torch_flash"


class _WrongScale(_Fake):
    def forward(self, query, key, value, rule, *, causal):
        return super().forward(query, key, value, replace(rule, scale=rule.scale * 1.5), causal=causal)


class _NotCausal(_Fake):
    def forward(self, query, key, value, rule, *, causal):
        return super().forward(query, key, value, rule, causal=False)


class _FirstAligned(_Fake):
    """Causal from the first key on, without saying so."""

    def _scores(self, query, key, rows, rule, causal):
        scores = super()._scores(query, key, rows, rule, False)
        if causal:
            row = torch.arange(rows.start, rows.stop).unsqueeze(-1)
            scores = scores.masked_fill(torch.arange(key.shape[1]) > row, float("-inf"))
        return scores


class _WrongHeads(_Fake):
    """Query head h reads kv head h % kv_heads."""

    def forward(self, query, key, value, rule, *, causal):
        order = torch.tensor([0, 2, 1, 3])
        out, lse = super().forward(query[:, :, order], key, value, rule, causal=causal)
        return out[:, :, order], lse[:, order]


class _WrongLse(_Fake):
    """The output is right; the lse, in base 2, spoils only the gradients."""

    def forward(self, query, key, value, rule, *, causal):
        out, lse = super().forward(query, key, value, rule, causal=causal)
        return out, lse / 0.6931472


class _WrongGradient(_Fake):
    def backward(self, *args, **kwargs):
        grad_query, grad_key, grad_value = super().backward(*args, **kwargs)
        return grad_query, grad_key * 1.001, grad_value


class _NaN(_Fake):
    def forward(self, query, key, value, rule, *, causal):
        out, lse = super().forward(query, key, value, rule, causal=causal)
        out[0, 0] = float("nan")
        return out, lse


class _Raises(_Fake):
    def forward(self, *args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor execution on the device")


class _RaisesInBackward(_Fake):
    def backward(self, *args, **kwargs):
        raise NotImplementedError


WRONG = [_WrongScale, _NotCausal, _FirstAligned, _WrongHeads, _WrongLse, _WrongGradient, _NaN]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128])
def test_auto_takes_torch_cpu(dtype, head_dim):
    assert choose("auto", dtype, head_dim, head_dim).name == "torch_cpu"


@pytest.mark.parametrize("name", ["torch_cpu", "naive"])
def test_a_named_kernel_is_taken(name):
    assert choose(name) is KERNELS[name]


def test_a_right_kernel_is_taken_in_order(monkeypatch):
    """The fakes below are refused for what they do wrong, not for being fakes."""
    fake = _Fake()
    monkeypatch.setitem(KERNELS, "torch_flash", fake)
    assert choose() is fake
    choose_kernel.cache_clear()
    assert choose("torch_flash") is fake


@pytest.mark.parametrize("kernel", WRONG, ids=lambda k: k.__name__)
def test_auto_passes_over_a_wrong_kernel(monkeypatch, caplog, kernel):
    monkeypatch.setitem(KERNELS, "torch_flash", kernel())
    with caplog.at_level(logging.INFO, logger="hf_fpdt"):
        assert choose().name == "torch_cpu"
    assert "torch_flash is wrong here: " in caplog.text
    assert "differs from the definition by" in caplog.text


@pytest.mark.parametrize("kernel", WRONG, ids=lambda k: k.__name__)
def test_a_named_wrong_kernel_is_an_error(monkeypatch, kernel):
    monkeypatch.setitem(KERNELS, "torch_flash", kernel())
    with pytest.raises(ValueError, match=r"FPDTConfig\(kernel='torch_flash'\): torch_flash is wrong here: \w+ differs.*auto"):
        choose("torch_flash")


@pytest.mark.parametrize(
    ("kernel", "text"),
    [(_Raises, "RuntimeError: no kernel image is available"), (_RaisesInBackward, "NotImplementedError: ")],
    ids=["forward", "backward"],
)
def test_a_kernel_that_raises(monkeypatch, caplog, kernel, text):
    monkeypatch.setitem(KERNELS, "torch_flash", kernel())
    with caplog.at_level(logging.INFO, logger="hf_fpdt"):
        assert choose().name == "torch_cpu"
    assert f"torch_flash failed its probe with {text}" in caplog.text
    assert "for execution on the device" not in caplog.text
    with pytest.raises(ValueError, match=f"torch_flash failed its probe with {text}"):
        choose("torch_flash")


def test_running_out_of_memory_says_nothing_about_a_kernel(monkeypatch):
    """The choice is remembered: a GPU that was full at the first call may not slow down all later ones."""
    fake = _Fake()
    monkeypatch.setitem(KERNELS, "torch_flash", fake)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fake, "backward", full)
        for name in ("auto", "torch_flash"):
            with pytest.raises(torch.OutOfMemoryError):
                choose(name)
    assert choose("auto") is choose("torch_flash") is fake


def test_the_error_names_what_is_usable():
    with pytest.raises(
        ValueError, match=r"cudnn runs on CUDA devices only.*Usable here: torch_cpu, naive; kernel=\"auto\" takes"
    ):
        choose("cudnn")


def test_the_documented_table_says_what_kernels_have():
    text = (
        (Path(__file__).parents[1] / "docs" / "settings.md").read_text().split("### `kernel`")[1].split("\nHeads of another")[0]
    )
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith('| `"')]
    told = {row[0].strip('| `"'): frozenset(row[-1].strip(" |").split(", ")) - {""} for row in rows}
    assert told == {name: kernel.features for name, kernel in KERNELS.items()}


def test_a_slow_kernel_on_a_gpu_is_worth_a_warning(monkeypatch, caplog):
    """As for capped scores without flash-attn."""
    monkeypatch.setattr(kernel_choice, "_probe", lambda *args: None)
    monkeypatch.setattr(kernel_choice, "_why_not", lambda kernel, *args: None if kernel.name == "naive" else "has no softcap")
    with caplog.at_level(logging.WARNING, logger="hf_fpdt"):
        choose_kernel("auto", torch.device("cuda"), torch.bfloat16, 64, 64, frozenset(["softcap"]))
    assert (
        "attention kernel naive for cuda, bfloat16, head_dim 64, softcap, which is slow; flash_attention_4 has" in caplog.text
    )


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="hf_fpdt"):
        for _ in range(3):
            choose("auto", torch.bfloat16, 64, 64)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(messages) == 1
    assert messages[0].startswith("hf_fpdt: attention kernel torch_cpu for cpu, bfloat16, head_dim 64")
    assert "flash_attention_4" not in messages[0], "kernels of another device say nothing about this one"


def test_the_log_says_why_a_faster_one_was_passed_over(monkeypatch, caplog):
    monkeypatch.setattr(KERNELS["torch_cpu"], "forward", None)
    with caplog.at_level(logging.INFO, logger="hf_fpdt"):
        assert choose("auto", torch.float32, 24, 24).name == "naive"
    assert "; torch_cpu failed its probe with TypeError" in caplog.text


def test_the_probe_runs_once_per_kind_of_tensor(monkeypatch):
    probed = []
    original = kernel_choice._probe
    monkeypatch.setattr(kernel_choice, "_probe", lambda kernel, *args: probed.append(kernel.name) or original(kernel, *args))
    for _ in range(3):
        choose()
    choose("auto", torch.bfloat16)
    assert probed == ["torch_cpu", "torch_cpu"]


def test_the_random_stream_of_the_user_is_untouched():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    choose()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_probe_is_the_same_under_autocast():
    """A model may meet its first chunk under autocast; the probe's own matmuls may not be cast by it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose("auto", torch.float32).name == "torch_cpu"
        assert choose("auto", torch.float64).name == "torch_cpu"


def test_the_probe_leaves_no_graph_and_runs_under_inference_mode():
    with torch.inference_mode():
        assert choose().name == "torch_cpu"
