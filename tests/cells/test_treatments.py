"""sest/cells/treatments.py: drugs, doses and times in labels."""

from __future__ import annotations

from sest.cells.treatments import Treatment, treatments_of


def test_drugs_and_doses_of_a_label_are_apart() -> None:
    label = "[('Trametinib', 0.05, 'uM'), ('(+)-JQ1', 1.0, 'uM')]"
    assert treatments_of(label) == (Treatment("Trametinib", 0.05, "uM"), Treatment("(+)-JQ1", 1.0, "uM"))
    assert treatments_of("Nutlin-3a_0.5uM") == (Treatment("Nutlin-3a", 0.5, "uM"),)
    for time, hours in (("_48h", 48.0), (" 2 days", 48.0), ("@30min", 0.5), ("_6hr", 6.0)):
        assert treatments_of(f"Nutlin-3a_0.5uM{time}") == (Treatment("Nutlin-3a", 0.5, "uM", hours),)
    assert treatments_of("STAT1") == treatments_of("[('x', 'high', 'uM')]") == treatments_of("[(" * 300) == ()
