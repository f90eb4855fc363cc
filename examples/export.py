"""Export a trained policy to ONNX and to PyTorch's export format, for machines that have neither DIPO nor SB3.

    python examples/export.py runs/hopper/dipo.zip --folder runs/export

Without a file it trains a small agent on Pendulum-v1 first. It writes `policy.onnx`, for onnxruntime and its like, and
`policy.pt2`, for `torch.export.load("policy.pt2").module()`: each takes a batch of observations, of any size, and gives the
actions of `model.predict(observations, deterministic=True)`, in the environment's units. The whole reverse process is
inside, with the solver and number of steps that `model.policy.set_sampler("evaluation", ...)` left. Observations go in as
`predict` takes them, but images channels first; an agent trained with VecNormalize needs them normalised, as `predict` does.
Dict observations, and the best of several candidates, which needs the critic, are beyond this example. Both files are compared
with `predict` at the end. Needs the extra `export`.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import torch as th
from gymnasium import spaces
from onnxscript import optimizer
from torch import nn

from sb3_dipo import DIPO

TOLERANCE = 1e-5  # of half the width of the action's box; float32 alone makes two batch sizes of predict() differ by some 1e-6


class DeterministicPolicy(nn.Module):
    """Observations, batch_size first, to actions (batch_size, *action_space.shape) in the environment's units."""

    def __init__(self, model: DIPO):
        super().__init__()
        box = model.action_space
        assert isinstance(box, spaces.Box)
        self.actor, self.sampler = model.policy.actor, model.policy.samplers["evaluation"]
        self.low, self.high = nn.Buffer(th.as_tensor(box.low)), nn.Buffer(th.as_tensor(box.high))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        actions = self.actor(observations, deterministic=True, sampler=self.sampler).reshape(-1, *self.low.shape)  # in [-1, 1]
        return self.low + 0.5 * (actions + 1.0) * (self.high - self.low)


def export(model: DIPO, observations: np.ndarray, folder: Path) -> float:
    """Write both files; return their largest difference from `predict`, in halves of the box, on these observations."""
    expected, _ = model.predict(observations, deterministic=True)
    policy, inputs = DeterministicPolicy(model).eval().requires_grad_(False), th.as_tensor(observations)
    with th.no_grad():
        program = th.export.export(policy, (inputs,), dynamic_shapes={"observations": {0: th.export.Dim("batch")}})
    th.export.save(program, folder / "policy.pt2")
    # Not optimize=True: it takes any factor within 1e-5 of 1 for 1, and the last step of a solver has one.
    in_onnx = th.onnx.export(program, input_names=["observations"], output_names=["actions"], optimize=False, verbose=False)
    assert in_onnx is not None  # for mypy
    optimizer.fold_constants(in_onnx.model)
    optimizer.remove_unused_nodes(in_onnx.model)
    in_onnx.save(folder / "policy.onnx")

    reloaded = th.export.load(folder / "policy.pt2").module()
    session = onnxruntime.InferenceSession(folder / "policy.onnx")
    (from_onnx,) = session.run(None, {"observations": observations})
    halves = 0.5 * (policy.high - policy.low).numpy()
    return max(float(np.abs((actions - expected) / halves).max()) for actions in (reloaded(inputs).numpy(), from_onnx))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?", help="what model.save() wrote (a small agent, trained here)")
    parser.add_argument("--folder", type=Path, default=Path("runs/export"), help="where both files go (%(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.model:
        model = DIPO.load(args.model, device="cpu")
    else:
        small = {"num_train_timesteps": 10}
        model = DIPO("MlpPolicy", "Pendulum-v1", learning_starts=100, device="cpu", policy_kwargs=small).learn(150)
    candidates = model.policy.samplers["evaluation"].num_candidates
    if candidates > 1:
        raise SystemExit(f"An export has one candidate: use set_sampler('evaluation', num_candidates=1), not {candidates}.")
    difference = export(model, np.stack([model.observation_space.sample() for _ in range(64)]), args.folder)
    print(f"{args.folder}: the largest difference from predict() is {difference:.1e} of half the box")
    if not difference <= TOLERANCE:
        raise SystemExit(f"That is more than {TOLERANCE} of it: do not use these files.")


if __name__ == "__main__":
    main()
