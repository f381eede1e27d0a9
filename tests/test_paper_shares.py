"""Where a step's time goes: names of kernels, and the arithmetic on a trace made by hand."""

import argparse
import json

import pytest
import torch

import hf_fpdt  # noqa: F401  (makes "fpdt" known)
from benchmarks.overlap import warmed_up
from benchmarks.paper import shares
from benchmarks.paper.shares import BACKWARD, FORWARD, LAUNCH, LINK, MATRICES, OTHER, Again

NAMES = {
    FORWARD: [
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensorptrbf16",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>(pytorch_flash::Flash_fwd_params)",
        "void flash::FlashAttnFwdSm90<...>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
    ],
    BACKWARD: [
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at__tensorptrbf16",
        "kernel_cutlass_kernel_flash_attncuteflash_bwd_postprocessFlashAttentionBackwardPostprocess_object_at__",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x64x128_1x1x1_kernel0_0",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(float*)",
        "void cudnn::fusion::convert_dq_to_16bits<__nv_bfloat16, 0>(float*)",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128>>()",
        "fmha_cutlassB_bf16_aligned_128x64_k128_dropout_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)",
    ],
    MATRICES: [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>()",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256_32x3_tn_align8>()",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16>()",
    ],
    OTHER: [
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>()",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>()",
        "_swiglu_backward_kernel",
        "_rms_norm_forward_kernel",
        "_triton_rope",
        "triton_poi_fused_add_mul_0",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>()",
        "a kernel that nobody knows",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kernels_are_told_by_their_names(kind, name):
    assert shares.kind_of(name) == kind


def _event(cat, name, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts * 1e6, "dur": dur * 1e6, "args": args}


# 20 s: 2 forward, 4 backward, 6 matrices (1 of them beside the backward), 2 others, 3 of copies alone, 4 of nothing.
TRACE = {
    "traceEvents": [
        _event("kernel", NAMES[FORWARD][0], 0, 2),
        _event("kernel", NAMES[BACKWARD][0], 2, 4),
        _event("kernel", NAMES[MATRICES][0], 5, 6),
        _event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 10, 4, bytes=40 << 30),
        _event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 16, 2, bytes=2 << 20),
        _event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 18, 1, bytes=4),
        _event("kernel", NAMES[OTHER][0], 16.5, 0.5),
        _event("kernel", NAMES[OTHER][0], 18.5, 1.5),
        _event("cpu_op", "aten::mm", 0, 20),
    ]
}
SHAPE, SEQ_LEN, LAYERS = "tiny", 1000, 2
ATTENTION = 4 * SEQ_LEN**2 / 2 * 64  # of a layer's forward
LAYER, HEAD = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128, 64 * 512  # weights
USEFUL = 6 * (LAYERS * LAYER + HEAD) * SEQ_LEN + 3 * LAYERS * ATTENTION
PEAK = USEFUL / 5  # a step of 5 s would be ideal


def test_every_moment_of_a_step_counts_once():
    row = shares.row_of(TRACE, SHAPE, LAYERS, SEQ_LEN, Again(2, 0), PEAK)
    seconds = {kind: found["seconds"] for kind, found in row["shares"].items()}
    assert seconds == pytest.approx({BACKWARD: 4, FORWARD: 2, MATRICES: 5, OTHER: 2, LINK: 4.5, LAUNCH: 2.5})
    assert sum(found["share"] for found in row["shares"].values()) == pytest.approx(1)
    assert row["profiled_s"] == pytest.approx(20)
    assert row["causal_mfu"] == pytest.approx(5 / 20)
    assert row["copies"]["gib_per_s"] == {"to host": pytest.approx(10), "to device": pytest.approx(2 / 1024 / 2)}
    assert row["copies"]["hidden"]["to host"] == pytest.approx(1 / 4)
    assert [(one["kind"], one["count"]) for one in row["top"]] == [(MATRICES, 1), (BACKWARD, 1), (FORWARD, 1), (OTHER, 2)]


def test_rates_and_what_would_be_gained():
    """By hand: the layers run again, so matrices have 8 operations a weight and token but for the head's 6."""
    row = shares.row_of(TRACE, SHAPE, LAYERS, SEQ_LEN, Again(2, 0), PEAK)
    matrices = (8 * LAYERS * LAYER + 6 * HEAD) * SEQ_LEN
    found = row["shares"]
    assert found[MATRICES]["tflops"] == pytest.approx(matrices / 5 / 1e12)
    assert found[FORWARD]["of_peak"] == pytest.approx(LAYERS * ATTENTION / 2 / PEAK)
    assert found[BACKWARD]["of_peak"] == pytest.approx(2 * LAYERS * ATTENTION / 4 / PEAK)
    assert found[LINK]["mfu_if_ideal"] == pytest.approx(5 / (20 - 4.5))
    assert found[LAUNCH]["mfu_if_ideal"] == pytest.approx(5 / (20 - 2.5))
    assert found[MATRICES]["mfu_if_ideal"] == pytest.approx(5 / (20 - 5 + matrices / PEAK))
    assert row["to_gain_for_target_s"] == pytest.approx(20 - 5 / 0.55)
    again = 2 * LAYERS * LAYER * SEQ_LEN / matrices * 5
    assert row["recomputation"] == pytest.approx({"seconds": again, "share": again / 20, "mfu_without": 5 / (20 - again)})
    twice = shares.row_of(TRACE, SHAPE, LAYERS, SEQ_LEN, Again(2, 2), PEAK)["shares"]
    assert twice[FORWARD]["tflops"] == pytest.approx(2 * found[FORWARD]["tflops"])


def test_a_timed_step_is_what_mfu_is_of():
    """The profiler took 4 s more: shares are as in the trace, seconds that can be gained are of the timed step."""
    row = shares.row_of(TRACE, SHAPE, LAYERS, SEQ_LEN, Again(2, 0), PEAK, step_s=16.0)
    assert row["causal_mfu"] == pytest.approx(5 / 16)
    assert row["shares"][LAUNCH]["to_gain_s"] == pytest.approx(2.5 / 20 * 16)


def test_the_command_reads_a_trace(tmp_path, monkeypatch, capsys):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACE | {"deviceProperties": [{"name": "NVIDIA H200"}]}))
    words = [
        "shares",
        "--trace",
        str(path),
        "--shape",
        SHAPE,
        "--layers",
        "2",
        "--seq-len",
        "1000",
        "--out",
        str(tmp_path / "s"),
    ]
    monkeypatch.setattr("sys.argv", words)
    shares.main()
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["header"]["gpu"] == "NVIDIA H200"
    assert str(tmp_path) not in json.dumps(result)
    said = capsys.readouterr().out
    assert "| attention backward | 4.000 | 20.0% |" in said
    assert "For 55% the step has to be" in said
    path.write_text(json.dumps(TRACE | {"deviceProperties": [{"name": "another"}]}))
    with pytest.raises(ValueError, match="'another'; add"):
        shares.main()


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"offload": "host", "recompute": True, "save_attention": True}, Again(2, 0)),
        ({"offload": "host", "save_attention": False}, Again(2, 2)),
        ({"offload": "none", "recompute": False}, Again(0, 0)),
    ],
)
def test_what_runs_again_is_known_from_the_plan(settings, want):
    args = argparse.Namespace(shape="tiny", layers=2, contender="fpdt", fpdt=json.dumps(settings), seq_len=128)
    try:
        model, step = warmed_up(args, "cpu")
        assert torch.isfinite(step())
    finally:
        torch.set_default_dtype(torch.float32)
    assert shares.again_of(model, "fpdt", 2) == want
    assert shares.again_of(model, "liger", 2) == Again(2, 2)
