"""Log-probabilities by chunks of positions, so that the logits of a batch never exist at once.

Logits of two responses of 4,096 tokens over 128k words take 4 GB in float32, and a loss needs
several copies. Here the model runs as usual up to its head. In the head's place one chunk of hidden
states after another becomes logits, and these become log-probabilities, which are all that a loss
needs. The backward pass computes each chunk's logits again.

The loop runs inside the call of the head, so what a strategy does around that call (gather the
head's weights, reduce their gradients) happens once, for any number of chunks.

What a model does to its logits behind the head (Gemma 2's soft cap, Cohere's scale) is its own
code: its `forward` runs for each chunk, with placeholders that give the results of the base model
and of the head. `Head.misfit` tries this on a few tokens against the model's own logits.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LOGITS = 1 << 26  # that exist at once unless a config says otherwise: 256 MB for each copy
NUM_TRIED = 8  # tokens of a trial
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative to the largest logit
Look = Callable[[Tensor, Tensor, slice], None]  # of logits, their logsumexp, and the positions
Place = tuple[dict[str, Any], str]  # where a module stands: its parent's modules, and its name


def chunk_of(vocabulary: int) -> int:
    """The positions of a chunk unless a config says otherwise."""
    return max(1, MAX_LOGITS // vocabulary)


class _HeadDone(Exception):  # noqa: N818 # it is no error
    """Ends a model's forward pass behind its head."""


class _Placeholder:
    """Stands in a module's place and gives one result; has the module's attributes."""

    def __init__(self, module: nn.Module, result: object) -> None:
        self._module, self._result = module, result

    def __call__(self, *_: object, **__: object) -> object:
        return self._result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Head:
    """The head of a model with all that the model does to its logits.

    Args:
        model: as transformers builds it, without the wrapper of a strategy.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.module: nn.Module | None = model.get_output_embeddings()
        self._forward = model.forward
        bases = {model.base_model: None, model.get_decoder(): None}  # a set in order
        self._bases = [base for base in bases if base is not model]
        stand = [*self._bases, *([] if self.module is None else [self.module])]
        self._places = {module: _places_of(model, module) for module in stand}
        self._base: tuple[nn.Module, object] | None = None  # the one called, a result of its kind

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the head that are trained."""
        assert self.module is not None
        return [each for each in self.module.parameters() if each.requires_grad]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of some positions. Only where the head's weights are whole, as they
        are inside `instead`.

        Args:
            hidden: (n, width) inputs of the head.

        Returns:
            (n, vocabulary).
        """
        assert self.module is not None
        # Not a call of the module, around which a strategy would act again.
        raw = type(self.module).forward(self.module, hidden.unsqueeze(0))
        return self._finished(raw).squeeze(0)

    def _finished(self, raw: Tensor) -> Tensor:
        """What the model makes of the head's output."""
        assert self.module is not None and self._base is not None
        base, result = self._base
        ids = torch.zeros(1, 1, dtype=torch.long, device=raw.device)
        with self._standing(base, result), self._standing(self.module, raw):
            return self._forward(input_ids=ids, use_cache=False).logits

    @contextmanager
    def _standing(self, module: nn.Module, result: object) -> Iterator[None]:
        """In the block, a placeholder stands everywhere in the model where the module stood."""
        placeholder = _Placeholder(module, result)
        for modules, name in self._places[module]:
            modules[name] = placeholder
        try:
            yield
        finally:
            for modules, name in self._places[module]:
                modules[name] = module

    def instead(self, run: Callable[[], object], body: Callable[[Tensor], Tensor]) -> Any:
        """Run the model up to its head, and `body` instead of the head.

        Args:
            run: calls the model, through a strategy's wrapper if there is one.
            body: takes the head's input, (sequences, positions, width).

        Returns:
            the result of `body`, and the base model's output.
        """
        assert self.module is not None
        results: list[Any] = []

        def take(module: nn.Module, inputs: object, output: object) -> None:
            results.append(output)  # after a strategy's hooks have seen it
            raise _HeadDone

        def forward(*args: Any, **kwargs: Any) -> Any:
            try:
                self._forward(*args, **kwargs)
            except _HeadDone:
                return results[0], outputs[-1]
            raise AssertionError("the model did not call its head")

        with self._noted() as outputs, ExitStack() as stack:
            stack.enter_context(_with_forward(self.model, forward))
            stack.enter_context(_with_forward(self.module, body))
            handle = self.module.register_forward_hook(take)
            stack.callback(handle.remove)
            return run()

    @contextmanager
    def _noted(self) -> Iterator[list[Any]]:
        """In the block, outputs of the base model are noted, and its kind of result is kept."""
        outputs: list[Any] = []

        def note(module: nn.Module, inputs: object, output: object) -> None:
            outputs.append(output)
            self._base = module, _one_position(output)

        with ExitStack() as stack:
            for base in self._bases:
                stack.callback(base.register_forward_hook(note).remove)
            yield outputs

    @torch.no_grad()
    def misfit(self, run: Callable[[Tensor], Tensor], device: torch.device) -> str:
        """Try chunks on a few tokens; says why they do not give the model's own logits, or "".

        Args:
            run: the model's logits of ids; all ranks call together.
        """
        if self.module is None or not self._bases:
            return "it has no head, or no base model, of its own"
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.arange(1, NUM_TRIED + 1, device=device).remainder(vocabulary)
        pieces: list[Tensor] = []
        calls: list[Tensor] = []
        has_weights_behind = False

        def body(hidden: Tensor) -> Tensor:
            nonlocal has_weights_behind
            assert self.module is not None
            calls.append(hidden)
            raw = type(self.module).forward(self.module, hidden)
            if hidden.shape[:2] == (1, NUM_TRIED) and self._base is not None:
                pieces.extend(map(self.logits, hidden[0].split(NUM_TRIED // 2 - 1)))
                with torch.enable_grad():
                    has_weights_behind = self._finished(raw).requires_grad
            return raw

        with self._noted(), _with_forward(self.module, body):
            whole = run(ids.unsqueeze(0))
        if len(calls) != 1 or not pieces:
            return "its head is not called once with one vector for each token"
        if has_weights_behind:
            return "weights that are trained stand behind its head"
        found = torch.cat(pieces)
        limit = TOLERANCES.get(whole.dtype, 2e-2) * whole.abs().max()
        if found.shape != whole.shape[1:] or not (found - whole[0]).abs().max() <= limit:
            return "its logits are not those of one position after another"
        return ""


def _one_position(output: Any) -> object:
    """A base model's output with the first position's hidden state alone, of the same kind."""
    from transformers.utils import ModelOutput

    if isinstance(output, ModelOutput):
        first = next(iter(output))
        return type(output)(**{first: output[first][:1, :1].detach()})
    return (output[0][:1, :1].detach(), *output[1:]) if isinstance(output, tuple) else output


def _places_of(model: nn.Module, module: nn.Module) -> list[Place]:
    """Where a module stands in a model."""
    return [
        (parent._modules, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is module
    ]


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """In the block, a module's forward pass is another function; its hooks stay."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def log_probabilities(
    head: Head, hidden: Tensor, targets: Tensor, chunk: int, look: Look | None = None
) -> Tensor:
    """The log-probability of a token at each position, (n,) float32, with gradients for the hidden
    states and the head.

    Args:
        hidden: (n, width) inputs of the head.
        targets: (n,) token ids.
        chunk: positions whose logits exist at once.
        look: sees each chunk's logits, without gradient: (c, vocabulary) float32, their logsumexp
            (c,), and which positions these are.
    """
    return _LogProbabilities.apply(head, targets, chunk, look, hidden, *head.parameters)


class _LogProbabilities(torch.autograd.Function):
    """As `log_probabilities`; head's parameters are arguments only so that they get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        head: Head,
        targets: Tensor,
        chunk: int,
        look: Look | None,
        hidden: Tensor,
        *_: nn.Parameter,
    ) -> Tensor:
        values = torch.empty(len(targets), device=hidden.device)
        norms = torch.empty_like(values)
        for part in _parts(len(targets), chunk):
            logits = head.logits(hidden[part]).float()
            norms[part] = logits.logsumexp(-1)
            values[part] = logits.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1) - norms[part]
            if look is not None:
                look(logits, norms[part], part)
        ctx.head, ctx.chunk, ctx.autocast = head, chunk, _autocast(hidden.device.type)
        ctx.save_for_backward(hidden, targets, norms)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, targets, norms = ctx.saved_tensors
        trained = ctx.head.parameters
        of_hidden = torch.empty_like(hidden)
        sums: list[Tensor | None] = [None] * len(trained)
        with ctx.autocast():  # around all chunks, which then share the head's weights in bf16
            for part in _parts(len(targets), ctx.chunk):
                inputs = hidden[part].detach().requires_grad_()
                with torch.enable_grad():
                    logits = ctx.head.logits(inputs)
                with torch.autocast(hidden.device.type, enabled=False):
                    outer = _outer(logits, targets[part], norms[part], gradient[part])
                    of_hidden[part], *found = torch.autograd.grad(
                        logits, [inputs, *trained], outer, allow_unused=True
                    )
                # In float32: many chunks would not add up in bf16.
                for i, each in enumerate(found):
                    total = sums[i]
                    if each is not None:
                        sums[i] = each.float() if total is None else total.add_(each)
        done = [s if s is None else s.to(p.dtype) for s, p in zip(sums, trained, strict=True)]
        return None, None, None, None, of_hidden, *done


@torch.no_grad()
def _outer(logits: Tensor, targets: Tensor, norms: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the logits from that of the log-probabilities: `g (onehot - softmax)`."""
    weight = gradient.unsqueeze(-1)
    outer = (logits.float() - norms.unsqueeze(-1)).exp_().mul_(-weight)
    return outer.scatter_add_(-1, targets.unsqueeze(-1), weight).to(logits.dtype)


def _parts(count: int, chunk: int) -> list[slice]:
    """Positions in chunks."""
    return [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]


def _autocast(kind: str) -> Callable[[], torch.autocast]:
    """The autocast context that holds now, to enter later."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled=enabled)
