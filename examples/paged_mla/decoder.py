"""Decodes a batch of requests that come and go: prefill one by one, then a token for all of them per step."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

import flash_mla
from paged_mla.attention import DecodeStep, PagedStep
from paged_mla.cache import PagedLatentCache


class PagedDecoder:
    """A model, its paged cache, and on a GPU the CUDA graph of a decode step.

    The graph has all of a step: it counts the tokens, finds their slots, plans the attention once, and runs the model,
    whose layers append to the cache and attend to it. All it reads that changes lies in tensors that stay: the tokens,
    the block table, the lengths, the pages. Rows without a request are decoded along: they write nothing, see nothing
    and have length 0. So the graph serves any number of requests, and it is captured when there is none.

    Attributes:
        cache: the PagedLatentCache.
    """

    def __init__(
        self,
        model: DeepseekV3ForCausalLM,
        max_requests: int,
        max_tokens: int,
        num_pages: int | None = None,
        use_graph: bool | None = None,
    ):
        """Make the cache, and capture the graph.

        Args:
            model: after `route_attention`.
            max_requests: that are decoded at the same time.
            max_tokens: of a request, prompt and generated ones.
            num_pages: for all requests together; by default as many as they can need.
            use_graph: whether a step is a CUDA graph; by default if the model is on a GPU.

        Raises:
            ValueError: a graph is wanted and the model is not on a GPU.
        """
        self.model = model.eval()
        device = model.device
        if use_graph and device.type != "cuda":
            raise ValueError(f"use_graph must be False for a model that is not on a GPU, got True for one on {device}")
        self.cache = PagedLatentCache(
            model.config.num_hidden_layers, max_requests, max_tokens, model.dtype, device, num_pages
        )
        self._tokens = torch.zeros(max_requests, 1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if use_graph or (use_graph is None and device.type == "cuda"):
            self._capture()

    @torch.no_grad()
    def add_request(self, prompt: Tensor) -> tuple[int, Tensor]:
        """Put the latents of a prompt into the cache.

        Args:
            prompt: (num_tokens,) int64.

        Returns:
            The row of the request, and the logits after its last token, (vocab_size,).

        Raises:
            ValueError: the prompt is not of 1 to max_tokens tokens in one dimension.
            RuntimeError: there is no row left; OutOfPagesError: there are not enough pages.
        """
        if prompt.dim() != 1:
            raise ValueError(f"prompt must have shape (num_tokens,), got {list(prompt.shape)}")
        row = self.cache.admit(len(prompt))
        prompt = prompt.to(self.model.device)
        output = self.model(
            input_ids=prompt[None],
            position_ids=torch.arange(len(prompt), device=prompt.device)[None],
            use_cache=False,
            logits_to_keep=1,
            paged_step=PagedStep(self.cache.layers, self.cache.slots(row)),
        )
        return row, output.logits[0, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every request.

        Args:
            tokens: (max_requests,) int64; those in rows without a request are ignored.

        Returns:
            The logits that follow, (max_requests, vocab_size), of no meaning in rows without a request. The next step
            writes to the same memory if it is a CUDA graph.

        Raises:
            ValueError: tokens have another shape, or a request has max_tokens already.
            OutOfPagesError: there are not enough pages; nothing has changed.
        """
        if tokens.shape != self._tokens.shape[:1]:
            raise ValueError(
                f"tokens must have shape (max_requests,) = {[len(self._tokens)]}, got {list(tokens.shape)}"
            )
        self.cache.reserve_next()
        self._tokens.copy_(tokens[:, None])
        if self._graph is None:
            return self._decode()
        self._graph.replay()
        return self._logits

    def remove_request(self, row: int) -> None:
        """Let others have the row and the pages of a request. Raises ValueError if the row has none."""
        self.cache.release(row)

    def _decode(self) -> Tensor:
        """The part of a step that is on the device."""
        positions, slots = self.cache.advance()
        schedule, _ = flash_mla.get_mla_metadata()
        step = DecodeStep(self.cache.layers, slots, self.cache.block_table, self.cache.cache_seqlens, schedule)
        output = self.model(input_ids=self._tokens, position_ids=positions[:, None], use_cache=False, paged_step=step)
        return output.logits[:, -1]

    @torch.no_grad()
    def _capture(self) -> None:
        device = self.model.device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # First without a graph: libraries allocate and compile in their first calls.
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._decode()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._logits = self._decode()
