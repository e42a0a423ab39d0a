"""Position embeddings against the formula in float64, on any grid, and unmoved by padding."""

import math

import pytest
import torch

from hf_detr.model.position_embedding import LearnedPositionEmbedding, SinePositionEmbedding

CPU = torch.device("cpu")


def test_sine_embedding_is_the_formula():
    d_model, height, width = 16, 3, 5
    table = SinePositionEmbedding(d_model)(height, width, None, CPU)
    half = d_model // 2
    for row in range(height):
        for column in range(width):
            expected = []
            for place, count in ((row + 1, height), (column + 1, width)):
                position = 2 * math.pi * place / (count + 1e-6)
                for i in range(half):
                    angle = position / 10000 ** (2 * (i // 2) / half)
                    expected.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
            torch.testing.assert_close(table[0, row * width + column], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [SinePositionEmbedding, LearnedPositionEmbedding])
@pytest.mark.parametrize(("height", "width"), [(7, 9), (60, 80)])
def test_an_image_gets_the_same_embedding_alone_and_beside_larger_ones(kind, height, width):
    embedding = kind(32)
    mask = torch.zeros(2, 90, 100, dtype=torch.bool)
    mask[0, :height, :width] = True
    mask[1] = True
    together = embedding(90, 100, mask, CPU).unflatten(1, (90, 100))
    alone = embedding(height, width, None, CPU).unflatten(1, (height, width))
    torch.testing.assert_close(together[0, :height, :width], alone[0], atol=1e-5, rtol=1e-5)


def test_learned_embedding_reads_the_table_on_small_grids_and_spreads_it_over_large_ones():
    embedding = LearnedPositionEmbedding(8)
    rows, columns = embedding.row_embeddings.weight, embedding.column_embeddings.weight
    small = embedding(2, 50, None, CPU).unflatten(1, (2, 50))[0]
    torch.testing.assert_close(small[1, 7], torch.cat((columns[7], rows[1])))
    large = embedding(99, 50, None, CPU).unflatten(1, (99, 50))[
        0
    ]  # 99 rows over 50 entries: every other one is halfway
    torch.testing.assert_close(large[98, 0], torch.cat((columns[0], rows[49])))
    torch.testing.assert_close(large[1, 0], torch.cat((columns[0], (rows[0] + rows[1]) / 2)))
