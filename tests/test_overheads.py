# SPDX-License-Identifier: MIT
"""What docs/overheads.py counts, by hand; its unit, and its reports."""
import sys

import overheads
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

torch.set_num_threads(1)
close = torch.testing.assert_close


def test_the_unit_is_attention_to_all_pixels():
    A = torch.randn(1, 16, 2, 3, dtype=torch.float64)
    X = A.flatten(2).mT                                         # [1, HW, M]
    close(overheads.PlainNonLocal()(A).flatten(2).mT, attend(X, X, X, scale=1))


def test_counts_by_hand():
    assert overheads.count("plain", 5, 16, 3, "cpu") == (0, 2 * 2 * 25 * 25 * 16, "")
    # One region, 8 representatives: two products of pixels with representatives in eq. 6, two among these in eq. 7, two
    # with pixels in eq. 8.
    assert overheads.count("one", 5, 16, 3, "cpu") == (9, 2 * 16 * (2 * 25 * 8 + 2 * 8 * 8 + 2 * 25 * 8), "1, 8")


def test_scenes_give_the_regions_that_their_rows_name():
    for kind, side, want in (("objects", 20, 25), ("one", 12, 1), ("pixels", 12, 144)):
        torch.manual_seed(0)
        assert overheads.ranet.RCB()(*overheads.scene(kind, side, 19)).labels.max() + 1 == want


@pytest.mark.parametrize("report", [[], ["--calls"]])
def test_reports_run(report, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["overheads.py", "--size", "9", "--rounds", "1", *report])
    overheads.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == (4 if report else 2 + len(overheads.BLOCKS)) and len({row.count("|") for row in rows}) == 1


def test_memory_of_a_known_call():
    def call():
        x = torch.ones(2 ** 20)                                 # 4 MiB
        y = x + 1                                               # 8
        del x                                                   # 4
        y + 1, y + 2                                            # 12
    assert 12 <= overheads.peak(call, "cpu") < 12.01
