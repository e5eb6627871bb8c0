"""Archives and the files next to them."""

import pytest
import transformers

from mvlm_core.export.manifest import ArchiveError
from mvlm_core.pipeline import packing
from mvlm_core.run_layout import Layout


def test_download_instructions_explain_custom_code_only_where_needed(tmp_path):
    layout = Layout(tmp_path)
    for name in ("plain", "coded"):
        layout.export(name).mkdir(parents=True)
    (layout.export("coded") / "modeling.py").touch()
    both = packing.download_instructions(["plain", "coded"], layout, 'Say "so"')
    assert "lets `coded` use" in both and 'tokenizer.bos_token + "Say \\"so\\"", split_special' in both
    assert f"'transformers>=5.4'`; made with {transformers.__version__})" in both
    assert "tar -xzf plain_model.tar.gz\ntar -xzf coded_model.tar.gz\n" in both
    assert "nothing is fetched" not in packing.download_instructions(["plain"], layout, "x")


def test_full_disk_leaves_no_archive_or_checksums_of_an_earlier_export(tmp_path, monkeypatch):
    layout = Layout(tmp_path)
    layout.downloads.mkdir()
    for file in (layout.checksums, layout.archive("one")):
        file.write_text("old")
    monkeypatch.setattr(packing, "write_archive", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ArchiveError, match="No space left; free space or fix the permissions"):
        packing.pack(layout, layout.export("one"), layout.archive("one"))
    assert list(layout.downloads.iterdir()) == []
