"""What a monitor sees of the server, in Prometheus' form."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_ponder.generation.request import Generation
from megatron_ponder.serving.worker import Snapshot

SECONDS_TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ponder_requests", "HTTP requests by path and status", ["path", "status"], registry=self._registry
        )
        self._sequences = Counter(
            "ponder_sequences", "Sequences that have ended", ["finish_reason"], registry=self._registry
        )
        self._to_first = Histogram(
            "ponder_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=SECONDS_TO_FIRST,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "ponder_time_per_token_seconds",
            "Between tokens after the first, mean of a sequence",
            buckets=SECONDS_PER_TOKEN,
            registry=self._registry,
        )

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Show the state of the generator, which this function gives."""
        self._registry.register(_EngineCollector(snapshot))

    def count_request(self, path: str, status: int) -> None:
        """Count an answer."""
        self._requests.labels(path, str(status)).inc()

    def observe(self, generation: Generation) -> None:
        """Count a sequence that has ended."""
        self._sequences.labels(generation.finish_reason).inc()
        if generation.tokens:
            self._to_first.observe(generation.seconds_to_first)
        if len(generation.tokens) > 1:
            between = generation.seconds - generation.seconds_to_first
            self._per_token.observe(between / (len(generation.tokens) - 1))

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads the counts that the generator keeps, when they are asked for."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        now = self._snapshot()
        usage = now.usage
        yield GaugeMetricFamily("ponder_queue_length", "Sequences that wait", now.waiting)
        yield GaugeMetricFamily("ponder_live_sequences", "Sequences in the running batch", now.live)
        yield GaugeMetricFamily("ponder_cached_slots", "Slots of the live sequences in the cache", now.cached_slots)
        yield CounterMetricFamily("ponder_tokens_generated", "Tokens generated", usage.tokens)
        yield CounterMetricFamily("ponder_slots_run", "Slots run, iterates of prompts included", usage.slots)
        yield CounterMetricFamily("ponder_forwards", "Forwards run", usage.forwards)
        yield CounterMetricFamily("ponder_rows", "Sequences that took part in forwards, summed", usage.rows)
        yield CounterMetricFamily("ponder_preemptions", "Sequences that went back to waiting", usage.preempted)
        yield CounterMetricFamily("ponder_shared_tokens", "Tokens of prompts taken from others", usage.shared)
        yield CounterMetricFamily("ponder_fed_tokens", "Tokens that ended sequences were fed", now.fed)
        yield CounterMetricFamily("ponder_executed_steps", "Latent steps of those tokens", now.executed)
        yield GaugeMetricFamily(
            "ponder_mean_executed_steps",
            "Latent steps a token, since the beginning",
            now.executed / max(1, now.fed),
        )
        yield GaugeMetricFamily(
            "ponder_rows_per_forward", "Mean since the beginning", usage.rows / max(1, usage.forwards)
        )
