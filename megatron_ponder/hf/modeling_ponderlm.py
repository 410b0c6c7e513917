"""PonderLM for Hugging Face transformers.

Every token t may take additional latent steps: slot (t, 0) is the token itself, slot (t, k) reads the hidden state of
slot (t, k - 1). A router decides after slot (t, 0) how many steps K̂ run, and how much each of them counts, as a key for
later slots and in the output.

`generate` runs this token by token with a key-value cache, which is the definition of the model. `forward` without a
cache evaluates all tokens in parallel by Jacobi iteration, which approaches the same numbers with every refinement.
Models of other modes (methods_ponderlm.py) run as many steps for every token, and `forward` gives the same numbers.

This file and the others named *_ponderlm.py are copied into every exported model, so they need only torch and
transformers. Shape suffixes: B sequences, L tokens, S slots of a token, T slots in all, H hidden, K + 1 choices of
steps, R rows of a batch that run a slot.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_ponderlm import PonderLMCache
from .configuration_ponderlm import PonderLMConfig
from .exits_ponderlm import check_exit, stopped
from .layers_ponderlm import (
    PonderLMLatentScale,
    PonderLMModel,
    PonderLMRouter,
    ResidualLinear,
    RouterOutput,
    document_layout,
    visible,
)
from .methods_ponderlm import METHODS, Latents

# A key of this log weight gets probability exactly 0 in every floating-point type, and stays finite in bf16.
DEAD = -1e4
# Initial bias of an untrained router for the last step.
ROUTER_INITIAL_BIAS = 2.0
ATTENTION = ("sdpa", "eager")
# What transformers calls the cache, in outputs and among what `generate` hands on: `cache` since version 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
# What other models take and this one does not, and what to do instead.
REFUSED = {
    "inputs_embeds": "give input_ids",
    "position_ids": "leave it out: positions follow from attention_mask and config.ponder_eod_id",
    "output_hidden_states": "register a forward hook on model.model, which runs once for every pass",
    "output_attentions": "leave it out",
}


@dataclass
class PonderLMOutput(CausalLMOutputWithPast):
    """The usual output of a causal language model, and how much it pondered.

    Attributes:
        executed_steps: int64 (B, L), latent steps K̂ that each token executed; 0 at padding.
    """

    executed_steps: Tensor | None = None


class PonderLMRouting(NamedTuple):
    """What the router decided for every token, under the hard rule: steps beyond K̂ do not exist.

    Attributes:
        log_w: (..., K + 1), log weight of each step as a key, `DEAD` beyond K̂, and in parallel beyond the step after
            those that the pass ran; None where every weight is 1.
        fusion: (..., K + 1), weight of each step's hidden state in the output; sums to 1.
        executed: int64 (...), K̂.
    """

    log_w: Tensor | None
    fusion: Tensor
    executed: Tensor


class PonderLMPreTrainedModel(PreTrainedModel):
    """Initialisation and loading."""

    config_class = PonderLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["PonderLMDecoderLayer"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True  # tokens cannot be taken back, so that there is no assisted generation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        if isinstance(module, nn.Embedding) and config.ponder_mode != "vanilla":
            # With c = sqrt(2.5 H) this gives scaled embeddings unit RMS, as the latents have.
            nn.init.normal_(module.weight, std=math.sqrt(2 / (5 * config.hidden_size)))
        elif isinstance(module, ResidualLinear):
            nn.init.normal_(module.weight, std=config.initializer_range / math.sqrt(2 * config.num_hidden_layers))
        elif isinstance(module, PonderLMLatentScale) and module.log is not None:
            nn.init.zeros_(module.log)
        elif isinstance(module, RouterOutput):
            nn.init.zeros_(module.weight)
            if not getattr(module.bias, "_is_hf_initialized", False):  # a slice loses this mark of a loaded weight
                module.bias[-1] = ROUTER_INITIAL_BIAS


class PonderLMForCausalLM(PonderLMPreTrainedModel, GenerationMixin):
    """PonderLM with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PonderLMConfig) -> None:
        if config._attn_implementation not in (None, *ATTENTION):
            raise ValueError(
                f"attn_implementation is {config._attn_implementation}; PonderLM has eager, and sdpa, which runs "
                "PyTorch's own flash-attention on GPUs"
            )
        super().__init__(config)
        self.model = PonderLMModel(config)
        self.router = PonderLMRouter(config) if config.ponder_mode == "adaptive" else None
        self.latent_scale = PonderLMLatentScale(config)
        pauses = config.ponder_mode in ("pause", "sps")
        self.pauses = nn.Embedding(config.ponder_steps, config.hidden_size) if pauses else None
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def method(self) -> Latents:
        """What latent steps read."""
        return METHODS[self.config.ponder_mode]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """Resize as every model does; from then on `generate` may give all of these tokens."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.ponder_pieces = new_num_tokens
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: PonderLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = False,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: PonderLMCache | None = None,
        pieces_alone: bool = False,
        **kwargs,
    ) -> PonderLMOutput:
        """Next-token logits.

        Without a cache, all tokens are evaluated in parallel by growth passes, `config.ponder_jacobi_iterations`
        refinements and a final pass. With a cache, tokens run one by one after those in the cache, without gradients;
        with `config.ponder_confidence_exit` always.
        At padding, the output is that of the last token before it, so that what follows the last column follows the
        text on whichever side it is padded.

        Args:
            input_ids: int64 (B, L).
            attention_mask: (B, L), or (B, tokens in the cache + L); 0 at padding, which may be anywhere.
            past_key_values: the `past_key_values` of an earlier output.
            labels: int64 (B, L), the input ids, with -100 where there is no loss; shifted here.
            use_cache: run token by token and return a cache.
            logits_to_keep: compute logits of the last so many tokens only; 0 for all.
            return_dict: return a `PonderLMOutput` rather than a tuple; `config.return_dict` unless given.
            cache: `past_key_values` under the name that newer versions of transformers give it.
            pieces_alone: give ids without a piece in the tokenizer no probability, as `generate` does.
            kwargs: for the loss function.

        Raises:
            ValueError: for arguments that do not fit together, or that this model does not take.
        """
        for name, remedy in REFUSED.items():
            given = kwargs.pop(name, None)
            if given is not None and given is not False:
                raise ValueError(f"PonderLM does not take {name}; {remedy}")
        if input_ids is None:
            raise ValueError("PonderLM needs input_ids")
        cache = past_key_values if cache is None else cache
        use_cache = use_cache or cache is not None
        exit = self.config.ponder_confidence_exit
        check_exit(exit, self.config.ponder_mode, self.config.ponder_latent_visibility)
        by_token = use_cache or exit is not None
        if by_token and labels is not None and self.training:
            raise ValueError(
                "with a cache there are no gradients; train with use_cache=False and no ponder_confidence_exit"
            )
        present = self._present(input_ids, attention_mask, cache)
        if by_token:
            if cache is None:
                lanes = self.method.lanes(self.config.ponder_steps)
                cache = PonderLMCache(len(input_ids), input_ids.device, lanes, self.config.ponder_own)
            fused, executed = self._run_tokens(input_ids, present, cache)
        else:
            fused, executed = self._run_passes(input_ids, present)
        logits = self.lm_head(fused[:, -logits_to_keep:])  # of -0, all
        if pieces_alone and self.config.ponder_pieces is not None:
            logits[..., self.config.ponder_pieces :] = -math.inf
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = PonderLMOutput(
            loss=loss, logits=logits, executed_steps=executed, **{CACHE: cache if use_cache else None}
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _present(self, ids_BL: Tensor, mask: Tensor | None, cache: PonderLMCache | None) -> Tensor | None:
        """Which of these tokens are no padding, bool (B, L); None if all are."""
        batch, tokens, seen = *ids_BL.shape, 0
        if cache is not None:
            if not isinstance(cache, PonderLMCache):
                raise ValueError(
                    f"past_key_values is a {type(cache).__name__}, which has one entry a token; leave it out, or give "
                    "the past_key_values of an earlier output of this model"
                )
            if len(cache.lengths) != batch:
                raise ValueError(f"past_key_values has {len(cache.lengths)} sequences, but input_ids {batch}")
            seen = cache.get_seq_length()
        if mask is None:
            return None
        if mask.dim() != 2 or len(mask) != batch or mask.shape[1] not in (tokens, seen + tokens):
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; it must be ({batch}, {seen + tokens}), 0 at padding"
            )
        present = mask[:, -tokens:].bool()
        return None if bool(present.all()) else present

    def _run_passes(self, ids_BL: Tensor, present_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """Growth passes, Jacobi refinements and the final pass: fused hidden states (B, L, H), K̂ (B, L)."""
        own, eod_id = self.config.ponder_own, self.config.ponder_eod_id
        # A token's latents are right once they have grown, if they depend on no other's.
        refinements = 0 if own else self.config.ponder_jacobi_iterations
        method, plan = self.method, self.method.plan(self.config.ponder_steps, refinements)
        ends_padded = present_BL is not None and not bool((present_BL[:, 1:] > present_BL[:, :-1]).any())
        # Nothing looks at padding that only follows, so that attention may be plainly causal, which is faster.
        positions, documents = document_layout(ids_BL, None if ends_padded and eod_id is None else present_BL, eod_id)
        inputs, log_w, ran = method.first(self, self.model.embed(ids_BL)), None, torch.zeros_like(ids_BL)
        for following in [*plan[1:], 0]:
            slots = inputs.shape[2]
            hidden = self.model(
                inputs.flatten(1, 2),
                positions.repeat_interleave(slots, 1),
                None if log_w is None else log_w.flatten(1, 2),
                visible(documents, ids_BL, slots, own),
            ).unflatten(1, (-1, slots))
            routing = self._route(hidden[:, :, 0], ran)
            if following:
                ran = torch.minimum(routing.executed, ran + 1).clamp(max=following - 1)
                inputs = method.following(self, inputs, hidden, following)
                log_w = None if routing.log_w is None else routing.log_w[:, :, :following]
        if self.router is None:
            fused = hidden[:, :, -1]
        else:
            fused = (routing.fusion.to(hidden.dtype).unsqueeze(-2) @ hidden).squeeze(-2)
        if present_BL is None:
            return fused, routing.executed
        columns = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        last = torch.where(present_BL, columns, 0).cummax(1).values
        return fused.gather(1, last.unsqueeze(2).expand_as(fused)), routing.executed * present_BL

    @torch.no_grad()
    def _run_tokens(self, ids_BL: Tensor, present_BL: Tensor | None, cache: PonderLMCache) -> tuple[Tensor, Tensor]:
        """Token by token after those in the cache: fused hidden states (B, L, H), K̂ (B, L)."""
        embedded_BLH = self.model.embed(ids_BL)
        fused_BLH = torch.zeros_like(embedded_BLH)
        seen = cache.get_seq_length()
        for index, ids_B in enumerate(ids_BL.unbind(1)):
            present_B = torch.ones_like(ids_B) if present_BL is None else present_BL[:, index]
            rows = present_B.nonzero().squeeze(1)
            cache.begin_token(rows)
            fused, executed = embedded_BLH[rows, index], rows.new_zeros(0)
            if len(rows):
                fused, executed = self._run_token(fused, rows, cache)
            eod_id = self.config.ponder_eod_id
            cache.end_token(rows, executed, fused, None if eod_id is None else ids_B[rows] == eod_id)
            fused_BLH[:, index] = cache.outputs
        return fused_BLH, cache.executed_steps[:, seen:]

    def _run_token(self, x_RH: Tensor, rows_R: Tensor, cache: PonderLMCache) -> tuple[Tensor, Tensor]:
        """Run the slots of one token in each of these rows: fused hidden states (R, H), K̂ (R,)."""
        log_w = None if self.router is None else torch.zeros(len(rows_R), dtype=torch.float32, device=x_RH.device)
        hidden = self._run_slot(x_RH, log_w, rows_R, cache)
        routing, exit = self._route(hidden), self.config.ponder_confidence_exit
        fusion = routing.fusion.to(hidden.dtype)
        fused, executed = fusion[:, :1] * hidden, routing.executed
        for step in range(1, int(routing.executed.max()) + 1):
            if exit is not None:
                executed = stopped(self.lm_head(hidden), executed, step - 1, exit)
            runs = (executed >= step).nonzero().squeeze(1)
            if not len(runs):
                break
            x_RH, hidden = x_RH.clone(), hidden.clone()
            x_RH[runs] = self.method.next_step(self, step, x_RH[runs], hidden[runs])
            log_w = None if routing.log_w is None else routing.log_w[runs, step]
            hidden[runs] = self._run_slot(x_RH[runs], log_w, rows_R[runs], cache, step)
            fused = fused + fusion[:, step : step + 1] * hidden  # of weight 0 in the rows that did not run
        return fused if exit is None else hidden, executed

    def _run_slot(
        self, x_RH: Tensor, log_w_R: Tensor | None, rows_R: Tensor, cache: PonderLMCache, step: int = 0
    ) -> Tensor:
        """Run one slot of each of these rows and append it to the cache: hidden states (R, H)."""
        positions = cache.positions[rows_R].unsqueeze(1)
        mask = cache.open_slot(rows_R, step)
        log_w = None if log_w_R is None else log_w_R.unsqueeze(1)
        return self.model(x_RH.unsqueeze(1), positions, log_w, mask, cache).squeeze(1)

    def _route(self, h_token: Tensor, ran: Tensor | None = None) -> PonderLMRouting:
        """The routing from h_{t,0} (..., H).

        In parallel, a pass that `ran` so many steps of each token, (...), fuses no more of them, and the next one may
        run one more.
        """
        config = self.config
        step = torch.arange(config.ponder_steps + 1, device=h_token.device)
        if self.router is None:
            executed = torch.full(h_token.shape[:-1], config.ponder_steps, device=h_token.device)
            return PonderLMRouting(None, (step == executed.unsqueeze(-1)).to(h_token.dtype), executed)
        logits = self.router(h_token) + config.ponder_router_bias * step
        # w_k = Σ_{j ≥ k} softmax(logits)_j, kept as its logarithm, which does not underflow.
        tails = logits.flip(-1).logcumsumexp(-1).flip(-1)
        log_w = tails - tails[..., :1]
        w = log_w.exp()
        executed = (w[..., 1:] >= config.ponder_threshold).sum(-1)  # w decreases with k and begins at 1
        last = (executed if ran is None else torch.minimum(executed, ran)).unsqueeze(-1)
        following = (executed if ran is None else torch.minimum(executed, ran + 1)).unsqueeze(-1)
        # The last executed step takes all the weight that remains.
        fusion = torch.where(step < last, (logits - tails[..., :1]).exp(), w).masked_fill(step > last, 0)
        return PonderLMRouting(log_w.masked_fill(step > following, DEAD), fusion, executed)

    @classmethod
    def _supports_default_dynamic_cache(cls, *args) -> bool:
        """False: transformers' own cache has one entry a token; `forward` makes the one that fits."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: PonderLMCache | None = None,
        attention_mask: Tensor | None = None,
        cache: PonderLMCache | None = None,
        **kwargs,
    ) -> dict:
        """What `forward` gets in one iteration of `generate`: the tokens that the cache has not seen.

        Raises:
            ValueError: if there are none.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None and next_sequence_length is None:
            whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
            next_sequence_length = input_ids.shape[1] - (cache.get_seq_length() if whole else 0)
            if next_sequence_length < 1:
                raise ValueError("input_ids must hold the tokens in the cache and at least one more")
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
            "pieces_alone": True,
        }
