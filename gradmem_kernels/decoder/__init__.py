"""One decoder, with a plain and a dual form, for the families of docs/decoder.md; over input embeddings."""

from gradmem_kernels.decoder.block import ContextRows
from gradmem_kernels.decoder.cache import KVCache
from gradmem_kernels.decoder.config import DecoderConfig, RopeScaling
from gradmem_kernels.decoder.decoder import Decoder
from gradmem_kernels.decoder.footprint import footprint
from gradmem_kernels.decoder.linear import drops, linear_dual

__all__ = ["ContextRows", "Decoder", "DecoderConfig", "KVCache", "RopeScaling", "drops", "footprint", "linear_dual"]
