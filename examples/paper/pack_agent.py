"""Make a small copy of an agent that the RL Zoo has trained, to publish and to play, and film it.

    python examples/paper/pack_agent.py runs/.../dipo/HalfCheetah-v5_1
    python -m rl_zoo3.enjoy --algo dipo --env HalfCheetah-v5 -f examples/agents

The best agent of the run goes into --out, in the zoo's layout. Its targets are the networks themselves and its optimizers
know nothing yet, which leaves a quarter of the file. It plays as before; training that goes on from it is another one.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image
from rl_zoo3.utils import create_test_env, get_saved_hyperparams

from sb3_dipo import DIPO

SEED = 10_000  # of the episode that is filmed, which is none of its training's
MIB = 2**20


def pack(run: Path, out: Path) -> Path:
    """
    Copy a run's best agent with what the zoo's ``enjoy`` needs.

    :param run: the zoo's folder of one training, such as ``logs/dipo/HalfCheetah-v5_1``
    :param out: the zoo's folder of all of them
    :return: the file of the agent
    """
    env_id = run.name.rpartition("_")[0]
    found = [path for path in (run / "best_model.zip", run / f"{env_id}.zip") if path.is_file()]
    if not env_id or not found:
        raise SystemExit(f"{run} is not the folder of a training of the RL Zoo: it has neither best_model.zip nor <env>.zip")
    model = DIPO.load(found[0], device="cpu", accelerate="auto")
    for network, target in ((model.actor, model.actor_target), (model.critic, model.critic_target)):
        network.optimizer.state.clear()
        for own, followed in zip(target.parameters(), network.parameters(), strict=True):
            own.data = followed.data  # what shares memory is saved once
    folder = out / "dipo" / f"{env_id}_1"
    (folder / env_id).mkdir(parents=True, exist_ok=True)
    model.save(folder / f"{env_id}.zip", exclude=["ep_info_buffer", "ep_success_buffer", "_last_obs", "_last_original_obs"])
    for path in (run / env_id).glob("*"):
        if path.name in ("config.yml", "vecnormalize.pkl"):  # args.yml and command.txt have paths of the machine
            shutil.copy(path, folder / env_id)
    return folder / f"{env_id}.zip"


def film(path: Path, gif: Path, frames: int, width: int) -> None:
    """
    Write a GIF of the beginning of an episode of a MuJoCo task, every second picture of it, which follows the body. The
    environment is wrapped as in training.

    :param path: the file of an agent, in the zoo's layout
    """
    hyperparams, stats = get_saved_hyperparams(str(path.with_suffix("")), test_mode=True)
    camera = dict(render_mode="rgb_array", camera_name="track", width=width, height=width * 5 // 8)
    env = create_test_env(path.stem, 1, stats, SEED, hyperparams=hyperparams, env_kwargs=camera)
    model, obs = DIPO.load(path, device="cpu"), env.reset()
    pictures: list[Image.Image] = []
    done = False
    while not done and len(pictures) < frames:
        for _ in range(2):
            action, _ = model.predict(obs, deterministic=True)  # type: ignore[arg-type]
            obs, _, (now,), _ = env.step(action)
            done = done or bool(now)
        picture = env.render()
        assert picture is not None
        pictures.append(Image.fromarray(picture).quantize(48))
    gif.parent.mkdir(parents=True, exist_ok=True)
    (step,) = env.get_attr("dt")
    pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=int(2_000 * step), loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the zoo's folder of a training of DIPO")
    parser.add_argument("--out", type=Path, default=Path("examples/agents"), help="where it is copied to (%(default)s)")
    parser.add_argument("--gif", type=Path, help="film it, too, and write the GIF there")
    parser.add_argument("--frames", type=int, default=75, help="pictures of the GIF (%(default)s)")
    parser.add_argument("--width", type=int, default=320, help="of the GIF, in pixels (%(default)s)")
    args = parser.parse_args()
    path = pack(args.run, args.out)
    print(f"{path}: {path.stat().st_size / MIB:.1f} MiB")
    if args.gif:
        film(path, args.gif, args.frames, args.width)
        print(f"{args.gif}: {args.gif.stat().st_size / MIB:.2f} MiB")


if __name__ == "__main__":
    main()
