"""Log-likelihoods of whole texts, longer than a model's context too."""

from collections.abc import Iterator, Sequence

from pipelines.engines.interface import Engine, LogLikelihood


def rolling_log_likelihoods(engine: Engine, texts: Sequence[str]) -> list[LogLikelihood]:
    """Log-likelihoods of texts after the token that begins texts, as lm-evaluation-harness has
    them: cut into windows of the model's context, each token predicted once, the last window with a
    full context.
    """
    windows = [list(_windows(engine, text)) for text in texts]
    flat = [window for each in windows for window in each]
    scored = iter(engine.log_likelihoods([c for c, _ in flat], [t for _, t in flat]))
    result = []
    for each in windows:
        parts = [next(scored) for _ in each]
        result.append(
            LogLikelihood(
                sum(part.value for part in parts),
                all(part.is_greedy for part in parts),
                sum(part.num_tokens for part in parts),
            )
        )
    return result


def _windows(engine: Engine, text: str) -> Iterator[tuple[list[int], list[int]]]:
    """Contexts with the tokens to predict after them."""
    first, tokens = engine.text.beginning, engine.encode(text)
    most = engine.most_scored - 1  # tokens that are read
    read = [first, *tokens]
    for start in range(0, len(tokens), most):
        stop = min(start + most, len(tokens))
        # read[start] is before tokens[start]; the last window reaches back for more context.
        begin = max(0, min(start, stop - most))
        yield read[begin : start + 1], tokens[start:stop]
