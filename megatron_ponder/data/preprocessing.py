"""Tokenise a corpus into an indexed dataset, with several processes and the same bytes for any number of them.

The corpus is cut into shards, see `shards`. Each rank tokenises every n-th of them, its workers together on one; then
it goes on to what the others have not finished, from the far end, and leaves a shard as soon as somebody else finishes
it. So a rank that dies costs nothing but time, and no rank waits for another. The first one joins the shards.
"""

import contextlib
import functools
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ponder.base.claims import Claim
from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder
from megatron_ponder.data.corpus import cut_inputs, no_documents, read_range
from megatron_ponder.data.dataset_manifest import DatasetManifest, fingerprint, write_dataset_manifest
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter, writing_claim
from megatron_ponder.data.encoding import Chunk, encode_in_order, encode_parts
from megatron_ponder.data.formats import AUTO
from megatron_ponder.data.indexed_dataset import dtype_for_vocabulary
from megatron_ponder.data.inputs import Inputs, describe_counts, find_inputs
from megatron_ponder.data.progress import ThroughputDisplay, warn
from megatron_ponder.data.segments import cut_segments, cuts_at_word_ends, group_chunks
from megatron_ponder.data.shards import Shard, ShardWriter, append_shard, make_shards
from megatron_ponder.data.text_files import ReadingCounts
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer

# Small enough to lose little of in a crash, large enough for its own files to cost nothing.
SHARD_BYTES = 1 << 28
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_FOR_LATE_RANKS = 600.0


@dataclass(frozen=True)
class Team:
    """The ranks that work on one dataset, through a folder that all of them see.

    Attributes:
        rank: of this process, below `size`.
        size: number of ranks.
        name: the same for all of them, and another for ranks started at another time; drawn if there is one rank.
    """

    rank: int = 0
    size: int = 1
    name: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class PreprocessingReport:
    """What a dataset was made of.

    Attributes:
        prefix: of the dataset.
        documents, tokens: in it.
        text_bytes: of their text as UTF-8.
        new_text_bytes: those of them that this run tokenised; the rest lay in finished shards of an earlier one.
        shards: of the corpus.
        reused_shards: those of them that an earlier run finished.
        skipped: what could not be used, by reason.
        seconds: that it took.
    """

    prefix: Path
    documents: int
    tokens: int
    text_bytes: int
    new_text_bytes: int
    shards: int
    reused_shards: int
    skipped: Counter[str]
    seconds: float

    def __str__(self) -> str:
        new = self.new_text_bytes / 1e6
        lines = [
            f"{self.prefix}.bin, .idx and .json: {counted(self.documents, 'document')}, "
            f"{counted(self.tokens, 'token')}",
            f"{self.text_bytes / self.tokens:.2f} bytes per token; "
            f"{new:.1f} MB in {self.seconds:.1f} s, {new / self.seconds:.1f} MB/s",
        ]
        if self.reused_shards:
            lines.append(f"{self.reused_shards} of {self.shards} shards were finished by an earlier run")
        if self.skipped:
            lines.append(f"skipped: {describe_counts(self.skipped)}")
        return "\n".join(lines)


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    workers: int = 1,
    append_eod: bool = True,
    key: str = "text",
    declared: str = AUTO,
    team: Team | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> PreprocessingReport | None:
    """Write `{output_prefix}_{key}_document.bin`, `.idx` and `.json` (the manifest).

    The files appear when all is done; a run that fails leaves an older dataset of that name as it was, and its finished
    shards in `{output_prefix}_{key}_document.shards` for the next run. Until then these take as much of the disk as the
    dataset itself. Memory holds the names of the input files, the current line of a `.jsonl` file or a few rows of a
    table, and a few chunks per worker.

    Args:
        inputs, key, declared: the corpus, see `find_inputs` and `read_range`.
        tokenizer_path: see `load_tokenizer`.
        workers: processes that tokenise; 1 does it in this one.
        append_eod: end each document with the tokenizer's end token.
        team: which of the ranks this is, unless it is alone; all must be given the same arguments.
        shard_bytes: input per shard, where it can be cut; without influence on the result.

    Returns:
        What was done by all ranks, on the first of them; None on the others.

    Raises:
        UserError: no documents, no tokenizer, a worker that died, or another process that makes this dataset.
        OSError: the output cannot be written.
    """
    started = time.perf_counter()
    if workers < 1:
        raise UserError(f"--workers is {workers}; set it to 1 or more")
    team = team or Team()
    tokenizer = load_tokenizer(tokenizer_path)
    prefix = Path(f"{output_prefix}_{key}_document")
    work = Path(f"{prefix}.shards")
    found = find_inputs(inputs, declared)
    options = f"{tokenizer.fingerprint} {append_eod} {key}"
    shards = make_shards(cut_inputs(found, shard_bytes), shard_bytes, work, options)
    make_folder(prefix.parent)
    # The other ranks only make shards, which may well be of use to whoever has the claim.
    with writing_claim(prefix) if team.rank == 0 else contextlib.nullcontext() as claim:
        for warning in found.warnings() if team.rank == 0 else ():
            warn(warning)
        make_folder(work)
        if team.size > 1:
            _attendance(work, team, team.rank).touch()
        try:
            _tokenise(_order(shards, team), tokenizer, append_eod, key, workers, team, shards)
            if team.rank > 0:
                return None
            report = _join(shards, team, prefix, tokenizer, started, found, claim)
        except BaseException:
            with contextlib.suppress(OSError):
                work.rmdir()  # only where there is nothing in it to go on from
            raise
        _clear(work, team)
    return report


def _order(shards: Sequence[Shard], team: Team) -> Iterator[Shard]:
    """A rank's own shards, then those of the others, which come last in their order, first."""
    yield from shards[team.rank :: team.size]
    for distance in range(1, team.size):
        yield from reversed(shards[(team.rank + distance) % team.size :: team.size])


def _tokenise(
    order: Iterable[Shard],
    tokenizer: Tokenizer,
    append_eod: bool,
    key: str,
    workers: int,
    team: Team,
    shards: Sequence[Shard],
) -> None:
    dtype = dtype_for_vocabulary(tokenizer.vocab_size)
    encode = functools.partial(encode_parts, tokenizer.path, append_eod, dtype)
    chunks = _chunks(order, key, cuts_at_word_ends(tokenizer))
    writer: ShardWriter | None = None
    documents = tokens = text_bytes = 0
    with ThroughputDisplay(shards, silent=team.rank > 0) as show:
        try:
            for chunk, encoded in encode_in_order(encode, chunks, workers):
                if writer is None or writer.shard is not chunk.shard:
                    if writer is not None:  # somebody else was faster
                        writer.discard()
                    writer = ShardWriter(chunk.shard, dtype)
                if encoded is None:
                    writer.finish(chunk.tally.skipped, team.name)
                    documents += writer.streams.num_documents
                    writer = None
                    continue
                writer.streams.add(encoded.tokens, encoded.counts, encoded.unfinished)
                writer.text_bytes += encoded.text_bytes
                text_bytes += encoded.text_bytes
                tokens += len(encoded.tokens)
                show.update(
                    documents + writer.streams.num_documents, text_bytes, tokens, chunk.shard, chunk.input_bytes
                )
        except FileNotFoundError:
            # The first rank removes the folder when the dataset is complete.
            if team.rank == 0 or shards[0].folder.parent.is_dir():
                raise
        finally:
            if writer is not None:
                writer.discard()


def _chunks(shards: Iterable[Shard], key: str, may_cut: bool) -> Iterator[Chunk]:
    """The text of all shards that are not finished; of those that another process finishes meanwhile, a part."""
    for shard in shards:
        if _is_done(shard):
            continue
        tally = ReadingCounts()
        parts = (segment for part in shard.ranges for segment in read_range(part, key, tally))
        for segments in group_chunks(cut_segments(parts, may_cut)):
            if _is_done(shard):
                break
            yield Chunk(shard, tally, tally.input_bytes, segments)
        else:
            yield Chunk(shard, tally, tally.input_bytes, [])


def _is_done(shard: Shard) -> bool:
    """Whether the shard is finished, or has even become part of the dataset, with which the folder goes away."""
    return shard.finished or not shard.folder.parent.is_dir()


def _join(
    shards: Sequence[Shard],
    team: Team,
    prefix: Path,
    tokenizer: Tokenizer,
    started: float,
    inputs: Inputs,
    claim: Claim,
) -> PreprocessingReport:
    """Make the dataset of its finished shards."""
    skipped: Counter[str] = Counter()
    text_bytes = new_text_bytes = reused = 0
    with IndexedDatasetWriter(prefix, dtype_for_vocabulary(tokenizer.vocab_size), claim) as writer:
        for shard in shards:
            report = append_shard(writer.streams, shard)
            skipped.update(report.skipped)
            text_bytes += report.text_bytes
            if report.run == team.name:
                new_text_bytes += report.text_bytes
            else:
                reused += 1
        documents = writer.streams.num_documents
        if documents == 0:
            for shard in shards:
                shutil.rmtree(shard.folder)
            raise no_documents(skipped, inputs)
    manifest = DatasetManifest(
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        documents=documents,
        tokens=writer.num_tokens,
        text_bytes=text_bytes,
        bin_sha256=writer.bin_sha256,
        idx_sha256=writer.idx_sha256,
        fingerprint=fingerprint(prefix),
    )
    write_dataset_manifest(prefix, manifest)
    return PreprocessingReport(
        prefix=prefix,
        documents=documents,
        tokens=writer.num_tokens,
        text_bytes=text_bytes,
        new_text_bytes=new_text_bytes,
        shards=len(shards),
        reused_shards=reused,
        skipped=skipped,
        seconds=time.perf_counter() - started,
    )


def _attendance(work: Path, team: Team, rank: int) -> Path:
    """A file that says that a rank has begun."""
    return work / f"{team.name}.{rank}.rank"


def _clear(work: Path, team: Team) -> None:
    """Remove the shards when every rank has begun; one that came later would find none, and do all again."""
    end = time.monotonic() + (SECONDS_FOR_LATE_RANKS if team.size > 1 else 0)
    while time.monotonic() < end and not all(_attendance(work, team, rank).exists() for rank in range(team.size)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    # At once, so that a rank that still writes there finds no half of it.
    removed = work.with_name(f"{work.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    work.rename(removed)
    shutil.rmtree(removed)
