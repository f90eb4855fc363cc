"""What does each part of DIPO do? Its generator, the length of its diffusion, and the write-back of improved actions.

    python examples/ablations.py generator --envs HalfCheetah-v5     # diffusion, VAE, MLP: Figures 9 and 20
    python examples/ablations.py length                              # K = 20, 50, 100: Figure 10, Table 1
    python examples/ablations.py write-back --base dipo_k20          # the paper's Algorithm 3, or the authors' code

`--base` is the DIPO that is varied, one of `learning_curves.py`'s, or of a file, `--variants`. The options, interruption and
many machines are as there.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from grid import VARIANTS, Variant, arguments, read_variants, run_and_report


def vary(base: Variant, study: str) -> dict[str, Variant]:
    """The first is the one that others are compared with."""

    def variant(label: str, policy_kwargs: dict[str, Any] | None = None, **settings: Any) -> Variant:
        given = {} if policy_kwargs is None else dict(policy_kwargs=policy_kwargs)
        return replace(base, label=label, settings=base.settings | given | settings)

    own: dict[str, Any] = base.settings.get("policy_kwargs", {})
    nets = {name: value for name, value in own.items() if name in ("net_arch", "n_critics", "activation_fn")}
    if study == "generator":  # the others have no process to set
        return dict(
            diffusion=variant("diffusion"),
            vae=variant("VAE", {**nets, "actor": "vae"}),
            mlp=variant("MLP", {**nets, "actor": "mlp"}),
        )
    if study == "length":
        return {f"k{length}": variant(f"K = {length}", {**own, "num_train_timesteps": length}) for length in (100, 50, 20)}
    return dict(
        write_back=variant("write-back (Algorithm 3)", persist_improved_actions=True),
        no_write_back=variant("none (released code)", persist_improved_actions=False),
    )


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
    args.out = args.out / args.study
    run_and_report(parser, args, vary(known[args.base], args.study), f"Ablation: {args.study} of {args.base}")


if __name__ == "__main__":
    main()
