"""Modules that hold options and parameters, and call the doors."""

from .cross_tokenizer import CrossTokenizerLoss as CrossTokenizerLoss
from .losses import FusedLinearKLDistillationLoss as FusedLinearKLDistillationLoss
from .losses import KLDistillationLoss as KLDistillationLoss
from .moe import MoEConfig as MoEConfig
from .moe import MoELayer as MoELayer
from .stage_collector import StageCollector as StageCollector
from .view_alignment import ViewAlignedAttention as ViewAlignedAttention
from .view_alignment import view_aligned_attention as view_aligned_attention
