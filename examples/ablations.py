"""What does each part of DIPO do? Its generator, the length of its diffusion, and the write-back of improved actions.

    python examples/ablations.py generator --envs HalfCheetah-v5     # diffusion, VAE, MLP: Figures 9 and 20
    python examples/ablations.py length                              # K = 20, 50, 100: Figure 10, Table 1
    python examples/ablations.py write-back --base dipo_k20          # the paper's Algorithm 3, or the authors' code

`--base` is the DIPO that is varied, one of `learning_curves.py`'s, or of a file, `--variants`. The options, interruption and
many machines are as there. With the same `--out` and options, the base is trained once for all of them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from grid import VARIANTS, Variant, arguments, read_variants, run_and_report


def vary(name: str, base: Variant, study: str) -> dict[str, Variant]:
    """The base, which keeps its name, and thereby its runs, and what is compared with it."""

    def variant(label: str, policy_kwargs: dict[str, Any] | None = None, **settings: Any) -> Variant:
        given = {} if policy_kwargs is None else dict(policy_kwargs=policy_kwargs)
        return replace(base, label=label, settings=base.settings | given | settings)

    own: dict[str, Any] = base.settings.get("policy_kwargs", {})
    nets = {key: value for key, value in own.items() if key in ("net_arch", "n_critics", "activation_fn")}
    if study == "generator":  # the others have no process to set
        others = dict(vae=variant("VAE", {**nets, "actor": "vae"}), mlp=variant("MLP", {**nets, "actor": "mlp"}))
        mine = "diffusion"
    elif study == "length":
        length = own.get("num_train_timesteps", 100)
        lengths = sorted({20, 50, 100} - {length}, key=lambda each: abs(each - length))
        others = {f"k{each}": variant(f"K = {each}", {**own, "num_train_timesteps": each}) for each in lengths}
        mine = f"K = {length}"
    else:
        labels = {True: "write-back (Algorithm 3)", False: "none (released code)"}
        back = base.settings.get("persist_improved_actions", True)
        others = {"no_write_back" if back else "write_back": variant(labels[not back], persist_improved_actions=not back)}
        mine = labels[back]
    return {name: variant(mine), **{f"{name}_{each}": other for each, other in others.items()}}


def main() -> None:
    quick = "with tiny networks, 300 steps of one task, two seeds: half a minute"
    parser = arguments(__doc__ or "", "runs/ablations", quick)
    parser.add_argument("study", choices=("generator", "length", "write-back"))
    parser.add_argument("--base", default="dipo", help="the DIPO that is varied (%(default)s)")
    parser.add_argument("--variants", type=Path, help="YAML file of more of them, see learning_curves.py")
    args = parser.parse_args()
    known = VARIANTS | (read_variants(args.variants) if args.variants else {})
    known = {name: variant for name, variant in known.items() if variant.algo == "dipo"}
    if args.base not in known:
        parser.error(f"--base must be of {', '.join(known)}, not {args.base}")
    args.baselines = "zoo"  # there are none
    variants = vary(args.base, known[args.base], args.study)
    run_and_report(parser, args, variants, f"Ablation: {args.study} of {args.base}", args.out / args.study)


if __name__ == "__main__":
    main()
