"""TransNormerLLM (TNL) as plain nn.Modules: `TNL(TNLConfig.preset("1b"))(tokens)`."""

from lasp.tnl.config import TNLConfig
from lasp.tnl.generation import generate
from lasp.tnl.model import TNL, TNLState

__all__ = ["TNL", "TNLConfig", "TNLState", "generate"]
