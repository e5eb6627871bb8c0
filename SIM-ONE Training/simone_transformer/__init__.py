"""The Enhanced SIM-ONE model. It imports only torch and transformers, because it ships inside each export."""

from .enhanced_model import EnhancedSIMONEConfig, EnhancedSIMONEModel, EnhancedSIMONEOutput
from .modern_layers import RMSNorm, SwiGLU, swiglu_width
from .rope_attention import TRACE_FIELDS, EnhancedGovernanceAttention

__all__ = [
    "TRACE_FIELDS",
    "EnhancedGovernanceAttention",
    "EnhancedSIMONEConfig",
    "EnhancedSIMONEModel",
    "EnhancedSIMONEOutput",
    "RMSNorm",
    "SwiGLU",
    "swiglu_width",
]
