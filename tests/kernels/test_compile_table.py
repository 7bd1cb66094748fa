"""benchmarks/compile_kernels.py finds what it is there to find."""

import compile_kernels


def test_limits():
    usage = compile_kernels.Usage
    assert usage("k", 86, 255, 101376, 0).violations() == []
    assert usage("k", 86, 32, 101377, 0).violations() == [
        "101377 bytes of shared memory, limit 101376"
    ]
    assert usage("k", 120, 255, 0, 8).violations() == ["8 bytes of local memory (spills)"]


def test_report_is_read():
    report = """
Fatbin elf code:
================
arch = sm_80
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function plain:
  REG:255 STACK:16 SHARED:2048 LOCAL:8 CONSTANT[2]:48 CONSTANT[0]:521 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90

Resource usage:
 Common:
  GLOBAL:0
 Function plain:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    first, second = compile_kernels.read_usages(report)
    assert (first.arch, first.registers, first.shared, first.local) == (80, 255, 2048, 16)
    assert (second.arch, second.registers, second.shared, second.local) == (90, 32, 0, 0)
    assert "plain" in compile_kernels.table([first, second])
    missing = [("plain", arch) for arch in (75, 86, 89, 100, 120)]
    assert compile_kernels.missing([first, second]) == missing
