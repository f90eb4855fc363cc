"""
CUDA graphs: a whole update, or acting, captured once and replayed in one launch. Where there is no GPU, the tests replay on
the CPU what a capture would keep.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch as th

from sb3_dipo.fast.device_buffer import DIPODeviceReplayBuffer
from sb3_dipo.fast.trees import map_tensors
from sb3_dipo.guard import Guard, clipped_gradient, non_finite

FUSED = (th.optim.Adam, th.optim.AdamW, th.optim.SGD)
WARM_UP = 3  # eager calls before a capture, as PyTorch asks for: libraries allocate and optimizers make their state
MAX_GRAPHS = 8  # of those that were called last: each holds the memory of its intermediate results


def _signature(tree: Any) -> Hashable:
    if isinstance(tree, th.Tensor):
        return tree.shape, tree.dtype
    if isinstance(tree, dict):
        return tuple((key, _signature(value)) for key, value in tree.items())
    return tuple(map(_signature, tree)) if isinstance(tree, tuple) else None


class CapturableGuard(Guard):
    """
    A :class:`~sb3_dipo.guard.Guard` that reads nothing on the host, so that its steps can be captured: after a loss that is
    not finite all steps change nothing, and :meth:`end` raises the error.

    :param device: of the networks
    """

    def __init__(self, device: th.device):
        self.finite = {name: th.tensor(True, device=device) for name in ("critic_loss", "actor_loss")}

    @property
    def ok(self) -> th.Tensor:
        """Whether everything was finite so far, a boolean scalar."""
        return th.stack(list(self.finite.values())).all()

    def prepare(self, optimizer: th.optim.Optimizer) -> None:
        """
        Let PyTorch's own optimizers step in one kernel, unless the user chose otherwise, and keep learning rate and step
        counts on the device, where a captured step reads them.
        """
        # the first, eager steps are no mistake: PyTorch would warn of them
        optimizer._warned_capturable_if_run_uncaptured = True
        for group in optimizer.param_groups:
            device = group["params"][0].device
            known = type(optimizer) in FUSED and group["fused"] is None
            if known and not group["foreach"] and not group["differentiable"]:
                group["fused"] = True
            if "capturable" in group:
                group["capturable"] = device.type == "cuda"
            group["lr"] = th.tensor(float(group["lr"]), dtype=th.float32, device=device)
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if isinstance(state.get("step"), th.Tensor):
                    state["step"] = state["step"].to(device, th.float32)

    def set_learning_rate(self, optimizer: th.optim.Optimizer, learning_rate: float) -> None:
        """As SB3's ``update_learning_rate``."""
        if not all(isinstance(group["lr"], th.Tensor) for group in optimizer.param_groups):
            self.prepare(optimizer)  # it is the user's, or has the user's rate
        for group in optimizer.param_groups:
            group["lr"].fill_(learning_rate)

    def begin(self) -> None:
        for flag in self.finite.values():
            flag.fill_(True)

    def end(self) -> None:
        for name, flag in self.finite.items():
            if not flag:
                raise non_finite(name)

    def _step(self, name: str, optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float) -> None:
        grad_norm = clipped_gradient(optimizer, loss, max_grad_norm)
        self.finite[name].logical_and_(th.isfinite(loss.detach() + grad_norm) | ~self.ok)  # later ones prove nothing
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = (~self.ok).float()  # type: ignore[attr-defined]  # as PyTorch's GradScaler tells it
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        elif self.ok:
            optimizer.step()

    def polyak_update(self, params: Iterable[th.Tensor], target_params: Iterable[th.Tensor], tau: float) -> None:
        targets = list(target_params)
        if targets:
            with th.no_grad():
                moved = list(th._foreach_mul(targets, 1 - tau))
                th._foreach_add_(moved, list(params), alpha=tau)
                for target, new in zip(targets, moved, strict=True):
                    target.copy_(th.where(self.ok, new, target))


class GraphBuffer:
    """
    A replay buffer as an update in a graph sees it. Storage on the device is drawn from and written to in the graph; of any
    other storage, the minibatches are drawn before and the improved actions written back after.

    :param buffer: the replay buffer
    :param guard: whose flag says whether improved actions are written
    """

    def __init__(self, buffer: Any, guard: CapturableGuard):
        self.buffer, self.guard = buffer, guard
        self.on_device = isinstance(buffer, DIPODeviceReplayBuffer)
        self.drawn: Any = None
        self.improved: Any = None

    def draw(self, batch_size: int, env: Any) -> tuple[Any, ...]:
        """Minibatches that the graph is given: none, or those for the critic and for the actor."""
        if self.on_device:
            return ()
        batch = self.buffer.sample_improved
        return self.buffer.sample(batch_size, env=env), batch(batch_size, env)

    def sample(self, batch_size: int, env: Any = None) -> Any:
        return self.drawn[0] if self.drawn else self.buffer.sample(batch_size, env=env)

    def sample_improved(self, batch_size: int, env: Any = None) -> Any:
        return self.drawn[1] if self.drawn else self.buffer.sample_improved(batch_size, env)

    def update_improved(self, rows: Any, envs: Any, actions: th.Tensor) -> None:
        if self.on_device:
            self.buffer.update_improved(th.where(self.guard.ok, rows, -1), envs, actions)
        else:
            self.improved = actions


class CudaGraphs:
    """
    Functions captured in CUDA graphs, one for each key and shape of the inputs, and replayed in one launch. The first calls
    run eagerly; one that cannot be captured runs eagerly for ever, with one warning that says why.

    :param device: a CUDA device
    """

    def __init__(self, device: th.device):
        self.device = device
        # of each key the number of eager calls, or what was captured; the newest last
        self._known: OrderedDict[Hashable, Any] = OrderedDict()
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.device,)  # a copy captures its own

    def clear(self) -> None:
        """Forget all graphs: what they read or write has moved."""
        self._known.clear()

    def act(self, policy: Any, observation: Any, which: str) -> th.Tensor:
        """Actions of a policy, (batch_size, action_dim); the arguments are those of its ``act``."""
        key = ("act", which, policy.samplers[which], _made_of(policy))
        actions: th.Tensor = self(lambda obs: policy.act(obs, which), key, observation)
        return actions

    def update(self, model: Any, replay_buffer: Any, batch_size: int, move_actor_target: bool) -> dict[str, th.Tensor]:
        """One update of a :class:`~sb3_dipo.DIPO`, see its ``_update``."""
        buffer = GraphBuffer(replay_buffer, model._guard)
        drawn = buffer.draw(batch_size, model._vec_normalize_env)

        def whole(*given: Any) -> tuple[Any, Any]:
            buffer.drawn, buffer.improved = given, None
            return model._update(buffer, batch_size, move_actor_target), buffer.improved

        given = (drawn[0], drawn[1]._replace(rows=None, envs=None)) if drawn else ()  # these stay on the host
        report, improved = self(whole, _update_key(model, replay_buffer, batch_size, move_actor_target), *given)
        if improved is not None and model._guard.ok:
            replay_buffer.update_improved(drawn[1].rows, drawn[1].envs, improved)
        return dict(report)

    def __call__(self, function: Callable[..., Any], key: Hashable, *inputs: Any) -> Any:
        """
        Call a function.

        :param function: of tensors, or of tuples and dicts of them; it may read and write other tensors that stay where they
            are, and must neither wait for the device nor depend on Python values that are not in the key
        :param key: what else the function depends on
        :param inputs: its arguments
        :return: what it returns
        """
        if self._failed:
            return function(*inputs)
        key = (key, _signature(inputs))
        known = self._known.pop(key, 0)
        if isinstance(known, int):
            if known < WARM_UP:
                outputs = self._warm_up(function, *inputs)
                self._remember(key, known + 1)
                return outputs
            # tensors made in inference mode could not be written to outside of it
            grad = th.is_grad_enabled()
            with th.inference_mode(False), th.set_grad_enabled(grad):
                static = map_tensors(th.clone, inputs)
                try:
                    replay, outputs = self._capture(lambda: function(*static))
                except Exception as error:
                    self._failed = True
                    self.clear()
                    warnings.warn(
                        f"`accelerate`: CUDA graphs cannot be used here, everything runs eagerly instead. The capture failed: "
                        f"{type(error).__name__}: {error}",
                        stacklevel=3,
                    )
                    return function(*inputs)
            known = replay, static, outputs
        self._remember(key, known)
        replay, static, outputs = known
        map_tensors(lambda kept, given: kept.copy_(given, non_blocking=True), static, inputs)
        replay()
        return map_tensors(th.clone, outputs)

    def _remember(self, key: Hashable, value: Any) -> None:
        self._known[key] = value
        if len(self._known) > MAX_GRAPHS:
            self._known.popitem(last=False)

    def _warm_up(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call on another stream, as captures do."""
        stream, current = th.cuda.Stream(self.device), th.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with th.cuda.stream(stream):
            outputs = function(*inputs)
        current.wait_stream(stream)
        return outputs

    def _capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = th.cuda.CUDAGraph()
        with th.cuda.device(self.device), th.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function()
        return graph.replay, outputs


def _update_key(model: Any, replay_buffer: Any, batch_size: int, move_actor_target: bool) -> Hashable:
    """All that an update depends on and that may change between two, as a value or by moving in memory."""
    names: tuple[str, ...] = ("gamma", "tau", "action_lr", "action_gradient_steps", "action_grad_norm_ratio", "max_grad_norm")
    names += ("persist_improved_actions", "max_action_shift", "action_gradient_start")
    uses = ("target", "behaviour") if model.action_gradient_start == "policy" else ("target",)
    settings = (*(getattr(model, name) for name in names), *(model.policy.samplers[use] for use in uses))
    optimizers: list[Any] = []
    for optimizer in (model.actor.optimizer, model.critic.optimizer):
        hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        optimizers += (id(optimizer), *map(len, hooks))
        optimizers += [
            _place(value) if name == "lr" else repr(value)
            for group in optimizer.param_groups
            for name, value in group.items()
            if name != "params"
        ]
        optimizers += [_place(value) for state in optimizer.state.values() for value in state.values()]
    trained = [(each.requires_grad, len(each._backward_hooks or ())) for each in model.policy.parameters()]
    storage = getattr(replay_buffer, "improved_actions", None)
    places = (id(replay_buffer), storage.data_ptr() if isinstance(storage, th.Tensor) else None)
    where = (places, model._vec_normalize_env is None)
    return "update", batch_size, move_actor_target, settings, tuple(optimizers), tuple(trained), where, _made_of(model.policy)


def _made_of(policy: Any) -> Hashable:
    """The modules of a policy, their hooks, modes and options, and where their tensors are: asked for at every action."""
    made: list[Any] = []
    for module in policy.modules():
        own = module.__dict__  # __getattr__ of modules is slow
        made += (id(module), own["training"], len(own["_forward_hooks"]), len(own["_forward_pre_hooks"]))
        made += (len(own["_backward_hooks"]), len(own["_backward_pre_hooks"]), own.get("eps"))
        made += [each.data_ptr() for kind in ("_parameters", "_buffers") for each in own[kind].values() if each is not None]
    for network in (policy.actor, policy.actor_target, policy.critic, policy.critic_target):
        made += [value for value in vars(network).values() if isinstance(value, (int, float, str))]
    return tuple(made)


def _place(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, th.Tensor) else value
