"""Sentence splitting by rules, in several scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm_cli.data.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \n ", []),
        ("No end mark", ["No end mark"]),
        ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
        ("Dr. J. R. Smith paid 3.14, e.g. here. Then left.", ["Dr. J. R. Smith paid 3.14, e.g. here.", "Then left."]),
        ("He left... and came back. Why?", ["He left... and came back.", "Why?"]),
        ('She said "Go!" (Now.) He went.', ['She said "Go!"', "(Now.)", "He went."]),
        ("He sat. No. Mr. Sun. Gone.", ["He sat.", "No.", "Mr. Sun. Gone."]),
        ("He said no. See No. 5, min. 3 on Sat. Jan. 4. Then go.",
         ["He said no.", "See No. 5, min. 3 on Sat. Jan. 4.", "Then go."]),
        ("Τι κάνεις; Καλά· εσύ;\u201d Ναι; και όχι. One; Two.",
         ["Τι κάνεις;", "Καλά· εσύ;\u201d", "Ναι; και όχι.", "One; Two."]),
        ("བོད་ཡིག་ཡིན། འདི་གཉིས་པ་ཡིན།", ["བོད་ཡིག་ཡིན།", "འདི་གཉིས་པ་ཡིན།"]),
        ("It was I. You know.", ["It was I.", "You know."]),
        ("A title\n\nA paragraph without end\n\nLast.", ["A title", "A paragraph without end", "Last."]),
        ("吾輩は猫である。名前はまだ無い。", ["吾輩は猫である。", "名前はまだ無い。"]),
        ("「何だ？」と言った。終り。", ["「何だ？」と言った。", "終り。"]),
        ("你好！你是谁？我是。", ["你好！", "你是谁？", "我是。"]),
        ("नमस्ते दुनिया। कैसे हैं?", ["नमस्ते दुनिया।", "कैसे हैं?"]),
        ("كيف الحال؟ بخير.", ["كيف الحال؟", "بخير."]),
        ("ሰላም። እንዴት ነህ፧ ደህና።", ["ሰላም።", "እንዴት ነህ፧", "ደህና።"]),
        ("ทุกคนมีสิทธิในการถือสัญชาติหนึ่ง บุคคลใด ๆ จะถูกตัดสัญชาติ",
         ["ทุกคนมีสิทธิในการถือสัญชาติหนึ่ง", "บุคคลใด ๆ จะถูกตัดสัญชาติ"]),
        ("Привет. Как дела? Хорошо.", ["Привет.", "Как дела?", "Хорошо."]),
    ],
)  # fmt: skip
def test_examples(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(st.text(alphabet='aB .!?。\n"」I1é', max_size=80))
def test_nothing_but_space_is_lost(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


def test_declaration_of_human_rights_in_every_script(test_data: Path) -> None:
    """Article 1 has two sentences in nearly every language; none of the files may come out as one block."""
    for file in sorted((test_data / "corpora/multilingual/udhr2").glob("*.txt")):
        text = file.read_text(encoding="utf-8-sig")
        sentences = split_sentences(text)
        assert len(sentences) > (120 if file.stem == "tha" else 60), file.name  # Thai: no marks, but clauses
