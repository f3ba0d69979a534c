"""Layers that hold seeds, and the swap that puts them in place of torch's."""

from rbe.nn.attention import KeyValues, MultiheadAttention
from rbe.nn.conv import Conv1d, Conv2d
from rbe.nn.convert import convert_layer
from rbe.nn.count import Count, count
from rbe.nn.embedding import Embedding
from rbe.nn.feedforward import FeedForward
from rbe.nn.linear import Linear
from rbe.nn.norm import BatchNorm1d, BatchNorm2d, LayerNorm, RMSNorm, fold
from rbe.nn.position import SeededEncoding, SinusoidalEncoding
from rbe.nn.recurrent import GRU, LSTM
from rbe.nn.rest import fold_norms, pack, round_rest, stored_bytes, unpack
from rbe.nn.seeded import Seeded, SeededVector, set_activations
from rbe.nn.stream import Stream, StreamConv2d, StreamEmbedding, StreamLinear
from rbe.nn.stream_lstm import StreamLSTM
from rbe.nn.transformer import BlockCache, TransformerBlock, TransformerDecoder, TransformerEncoder

__all__ = [
    "GRU",
    "LSTM",
    "BatchNorm1d",
    "BatchNorm2d",
    "BlockCache",
    "Conv1d",
    "Conv2d",
    "Count",
    "Embedding",
    "FeedForward",
    "KeyValues",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "Seeded",
    "SeededEncoding",
    "SeededVector",
    "SinusoidalEncoding",
    "Stream",
    "StreamConv2d",
    "StreamEmbedding",
    "StreamLSTM",
    "StreamLinear",
    "TransformerBlock",
    "TransformerDecoder",
    "TransformerEncoder",
    "convert_layer",
    "count",
    "fold",
    "fold_norms",
    "pack",
    "round_rest",
    "set_activations",
    "stored_bytes",
    "unpack",
]
