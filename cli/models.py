"""``vacc-opt models [FAMILY]``: the model families that are recognized, and what is fused in each."""

from __future__ import annotations

import json

import click


@click.command("models", short_help="List the model families that are recognized, and what is fused in each.")
@click.argument("family", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(family: str | None, as_json: bool) -> None:
    """List the model families that are recognized without a change to their code, or only FAMILY.

    The counts are those of a small model of each structure, of two layers. The tests export each of them and hold its
    logits against torch.
    """
    from vacc_opt.frontends.families import FAMILIES
    from vacc_opt.ir.errors import UserError, did_you_mean

    chosen = [one for one in FAMILIES if family is None or one.name == family]
    if family is not None and not chosen:
        raise UserError(f"no family {family!r}", did_you_mean(family, [one.name for one in FAMILIES]))
    rows = [(one.name, structure) for one in chosen for structure in one.structures]
    if as_json:
        click.echo(json.dumps([{"family": name, **structure.facts} for name, structure in rows], indent=2))
        return
    before = ""
    for name, structure in rows:
        if name != before:
            click.echo(name)
        before = name
        facts = structure.facts
        traits = [facts["position"], facts["norm"], facts["gate"], *([facts["also"]] if facts["also"] else [])]
        fused = "   ".join(f"{what} {count}/{count}" for what, count in structure.fused.items())
        click.echo(f"  {structure.checkpoints:<34} {structure.heads:<22} {fused}")
        click.echo(f"  {'':<34} {', '.join(map(str, traits))}")
