"""What does each part of DIPO do? Its generator, the length of its diffusion, and the write-back of improved actions.

    python examples/paper/ablations.py generator --envs HalfCheetah-v5     # diffusion, flow, VAE, MLP: Figures 9, 20
    python examples/paper/ablations.py length --base dipo_long             # K = 20, 50, 100: Figure 10, Table 1
    python examples/paper/ablations.py write-back --base dipo_paper        # the paper's Algorithm 3, or the authors' code

`--base` is the DIPO that is varied: one of those of `learning_curves.py`, or of a file, `--variants`. The options,
interruption and many machines are as there. With the same `--out` and options, the base is trained once for all studies.
"""

from dataclasses import replace
from typing import Any

from grid import K20, VARIANTS, Variant, choose, parse
from grid_report import QUICK, compare, comparison_arguments

from sb3_dipo import RECOMMENDED
from sb3_dipo.actors import ACTORS

OF_GENERATORS = {"actor", "samplers"}.union(*(actor.options for actor in ACTORS.values()))  # the others' make no sense to one


def policy_kwargs_of(base: Variant) -> dict[str, Any]:
    """Its own, or those of its entry in the YAML file."""
    entry: dict[str, Any] = {} if base.file == "dipo_paper.yml" else RECOMMENDED["policy_kwargs"]
    own: dict[str, Any] = base.settings.get("policy_kwargs", entry)
    return own


def vary(name: str, base: Variant, study: str) -> dict[str, Variant]:
    """The base, which keeps its name, and thereby its runs, and what is compared with it."""

    def variant(label: str, policy_kwargs: dict[str, Any] | None = None, **settings: Any) -> Variant:
        given = {} if policy_kwargs is None else dict(policy_kwargs=policy_kwargs)
        return replace(base, label=label, settings=base.settings | given | settings)

    own = policy_kwargs_of(base)
    if study == "generator":
        shared = {key: value for key, value in own.items() if key not in OF_GENERATORS}
        count = "num_candidates"  # the one option of sampling that all have
        if best := {use: {count: given[count]} for use, given in own.get("samplers", {}).items() if count in given}:
            shared["samplers"] = best
        actor = own.get("actor", "diffusion")
        labels = dict(diffusion="diffusion", flow="flow", vae="VAE", mlp="MLP")
        mine = labels.pop(actor)
        others = {each: variant(label, {**shared, "actor": each}) for each, label in labels.items()}
        if "diffusion" in others:
            others["diffusion"].settings["policy_kwargs"] |= K20
    elif study == "length":
        length = own.get("num_train_timesteps", 100)
        lengths = sorted({20, 50, 100} - {length}, key=lambda each: abs(each - length))
        others = {f"k{each}": variant(f"K = {each}", {**own, "num_train_timesteps": each}) for each in lengths}
        mine = f"K = {length}"
    else:
        both = {True: "write-back (Algorithm 3)", False: "none (released code)"}
        back = base.settings.get("persist_improved_actions", True)
        others = {"no_write_back" if back else "write_back": variant(both[not back], persist_improved_actions=not back)}
        mine = both[back]
    return {name: variant(mine), **{f"{name}_{each}": other for each, other in others.items()}}


def main() -> None:
    quick = "with tiny networks, 300 steps of one task, two seeds: half a minute"
    parser = comparison_arguments(__doc__ or "", "runs/ablations", quick)
    parser.add_argument("study", choices=("generator", "length", "write-back"))
    parser.add_argument("--base", default="dipo", help="the DIPO that is varied (%(default)s)")
    args = parse(parser, QUICK)
    dipos = {name: variant for name, variant in VARIANTS.items() if variant.algo == "dipo"}
    base = choose(parser, args, [args.base], dipos, "--base")[args.base]
    if base.algo != "dipo":
        parser.error(f"--base must be a DIPO, not {args.base}")
    if args.study == "length" and policy_kwargs_of(base).get("actor", "diffusion") != "diffusion":
        parser.error(f"--base must be a diffusion, such as dipo_long, to vary its length, not {args.base}")
    title = f"Ablation: {args.study} of {args.base}"
    compare(parser, args, vary(args.base, base, args.study), title, "paper", args.out / args.study)


if __name__ == "__main__":
    main()
