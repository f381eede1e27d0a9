import hf_fpdt


def test_public_names():
    assert set(hf_fpdt.__all__) == {"FPDTConfig", "__version__", "apply_fpdt", "restore"}
    assert len(hf_fpdt.__all__) <= 8
