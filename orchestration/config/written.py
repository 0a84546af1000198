"""A configuration as a file, and the JSON schema of such files."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from orchestration.config.sweep import SweepConfig


def to_yaml(config: SweepConfig) -> str:
    """The configuration as a complete sweep.yaml, in the order of the schema; reading it back gives
    an equal object."""
    plain = config.model_dump(mode="json", exclude=set() if config.presets else {"presets"})
    writer = YAML(typ="rt", pure=True)
    writer.width = 120
    writer.allow_unicode = True
    writer.representer.add_representer(type(None), _null)
    stream = io.StringIO()
    writer.dump(_styled(plain), stream)
    return "# Resolved by dsnet-orch: every setting of this sweep.\n" + stream.getvalue()


def _null(representer: RoundTripRepresenter, value: None) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _styled(value: Any, *, is_top: bool = True) -> Any:
    """Block style for sections, flow style for lists and for mappings that hold a list only, such
    as distributions."""
    if isinstance(value, list):
        sequence = CommentedSeq(_styled(item, is_top=False) for item in value)
        if not any(isinstance(item, dict) for item in value):
            sequence.fa.set_flow_style()
        return sequence
    if isinstance(value, dict):
        mapping = CommentedMap((key, _styled(item, is_top=False)) for key, item in value.items())
        if not value or (not is_top and len(value) == 1 and isinstance(next(iter(value.values())), list)):
            mapping.fa.set_flow_style()
        return mapping
    return value


def json_schema() -> dict[str, Any]:
    """JSON Schema of sweep.yaml, for editors that complete and check while the user types."""
    schema = SweepConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dsnet-orch sweep"}
