"""One text under two tokenizers: common spans, paired rows, patches, mapped vocabularies."""

from .aligner import Alignment as Alignment
from .aligner import CrossTokenizer as CrossTokenizer
from .tables import AlignedBatch as AlignedBatch
from .tables import align_batch as align_batch
from .tables import paired_rows as paired_rows
from .tables import patch_offsets as patch_offsets
