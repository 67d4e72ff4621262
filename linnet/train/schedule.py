"""Learning rate and batch size as functions of progress (MiniMax-01, section 4.2).

Linear warm-up over steps, a stable stretch, then an exponential decay over the last tokens. The
batch grows in stages with the tokens seen.
"""

from linnet.train.recipe import OptimSection, TrainSection


def learning_rate(step: int, tokens: int, optim: OptimSection, total_tokens: int) -> float:
    """Return the rate of the step that begins after `step` steps and `tokens` tokens."""
    warmup = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    decay_tokens = optim.decay_fraction * total_tokens
    done = 0.0
    if decay_tokens > 0:
        done = min(1.0, max(0.0, (tokens - (total_tokens - decay_tokens)) / decay_tokens))
    floor = optim.min_learning_rate / optim.learning_rate
    return optim.learning_rate * warmup * floor**done


def batch_tokens(tokens: int, train: TrainSection) -> int:
    """Return the batch size of the step that begins after `tokens` tokens."""
    for until, size in train.batch_warmup:
        if tokens < until:
            return size
    return train.batch_tokens


def count_steps(train: TrainSection, tokens: int = 0) -> int:
    """Return the steps from `tokens` seen to the end of training."""
    steps = 0
    while tokens < train.total_tokens:
        size = batch_tokens(tokens, train)
        stage_end = min((u for u, _ in train.batch_warmup if u > tokens), default=None)
        end = train.total_tokens if stage_end is None else min(stage_end, train.total_tokens)
        count = -(-(end - tokens) // size)
        steps += count
        tokens += count * size
    return steps
