"""``vacc-opt explain MODEL NODE``: where one thing of an artifact comes from."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("explain")
@click.argument("artifact", metavar="ARTIFACT")
@click.argument("node", metavar="NODE")
@click.option("--phase", help="Where to look: prefill, decode, or one with its sizes. Default: the first that has it.")
@click.option("--rank", type=int, help="Whose slice of a weight is meant. Default: 0.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with everything.")
def command(artifact: str, node: str, phase: str | None, rank: int | None, as_json: bool) -> None:
    """Trace NODE of ARTIFACT: kernel call, graph node, passes in order, source lines, tensors of the checkpoint.

    NODE is the name of a node, value or weight, a call (`call 17` or `#17`), or a module path such as
    `model.layers.3.self_attn`. ARTIFACT may also be an .onnx or .vacc file, which has no calls.
    """
    from vacc_opt.runtime.explain import explain
    from vacc_opt.runtime.explain_text import explanation_text

    found = explain(Path(artifact), node, phase=phase, rank=rank)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else explanation_text(found), nl=as_json)
