"""The same model and pipeline give the same bytes in every process, whatever its hash seed."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import sys
from vacc_opt.ir.onnx_proto import to_onnx
from vacc_opt.ir.text import to_text
from vacc_opt.passes.infra.manager import run_pipeline
from vacc_opt.tests.passes.decoder import decoder

graph = decoder()
pipeline = "simplify,fuse-gqa,slice-last-token,kv-cache{context=32},w8a16,split-tp{tp=4},legalize,expand-ranks,simplify"
report = run_pipeline(graph, pipeline)
for remark in report.remarks():
    print(remark)
for record in report.records:
    print(record.spec, record.changes, record.summary)
print(to_text(graph))
print(to_onnx(graph).SerializeToString(deterministic=True).hex())
"""


def test_text_remarks_and_model_do_not_depend_on_the_hash_seed() -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for seed in ("1", "4242")
    ]
    results = [p.communicate(timeout=60) for p in started]
    assert [p.returncode for p in started] == [0, 0], results[0][1].decode()
    assert len(results[0][0]) > 10_000
    assert results[0][0] == results[1][0]
