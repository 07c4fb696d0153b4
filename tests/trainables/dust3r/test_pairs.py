from collections import Counter

import pytest
import torch

from trainables.config import WorkloadSettings
from trainables.dust3r import pairs, rooms


@pytest.fixture(scope="module")
def workload():
    return WorkloadSettings(image_size="32x32", val_pairs=8, test_pairs=30)


@pytest.fixture(scope="module")
def edges(workload):
    return pairs.sampled(workload)


@pytest.fixture(scope="module")
def share():
    """Covisibility of the eight views of one scene."""
    views = rooms.render(42, "test", torch.tensor([30]), 8, (32, 32))
    to_first = torch.linalg.inv(views.pose[:, :1]) @ views.pose
    return pairs.covisibility(views.points[0], to_first[0], views.depth[0], views.intrinsics[0])


def test_twenty_pairs_that_the_seed_decides(workload, edges):
    assert len(edges) == len(set(edges)) == 20 and edges == sorted(edges)
    assert pairs.sampled(workload) == edges
    other = pairs.sampled(workload.model_copy(update={"workload_seed": 43}))
    assert len(other) == 20 and other != edges
    assert all(0 <= i < 8 and 0 <= j < 8 and i != j for _, i, j in edges)


def test_no_scene_serves_twice(workload, edges):
    scenes = {scene for scene, _, _ in edges}
    assert min(scenes) >= workload.test_pairs, "the pairs of the quality measurement are scenes 0 .. test_pairs - 1"
    assert len(scenes) > 1


@pytest.mark.parametrize("count", [1, 8, 33])
def test_as_many_as_asked_for(workload, count):
    asked = workload.model_copy(update={"sampled_pairs": count})
    assert len(pairs.sampled(asked)) == count
    least = workload.model_copy(update={"sampled_pairs": count, "views_per_scene": 2, "neighbours": 1})
    assert len(pairs.sampled(least)) == count


def test_every_pair_is_an_edge_of_its_graph(workload, edges):
    for scene in {scene for scene, _, _ in edges}:
        views = rooms.render(42, "test", torch.tensor([scene]), 8, (32, 32))
        to_first = torch.linalg.inv(views.pose[:, :1]) @ views.pose
        share = pairs.covisibility(views.points[0], to_first[0], views.depth[0], views.intrinsics[0])
        graph = pairs.nearest(share, 4)
        found = [(i, j) for s, i, j in edges if s == scene]
        assert set(found) <= set(graph)
        assert all(min(share[i, j], share[j, i]) > 0.02 for i, j in found), "they see something in common"


def test_images_are_those_of_the_pairs(workload, edges):
    images = pairs.images(workload)
    assert images.shape == (20, 2, 3, 32, 32) and images.dtype == torch.uint8
    scene, i, j = edges[7]
    alone = rooms.render(42, "test", torch.tensor([scene]), 8, (32, 32)).image[0]
    assert torch.equal(images[7], alone[[i, j]])


def test_a_view_sees_itself(share):
    assert share.diagonal().min() > 0.99
    assert share.min() >= 0 and share.max() <= 1


def test_covisibility_counts_what_is_in_front_and_unhidden():
    """A wall 2 m before camera 0; camera 1 beside it by a quarter of its width; camera 2 looks the other way; camera
    3 sees a screen in front of the wall.
    """
    size, focal = 8, 4.0
    v, u = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    ray = torch.stack([(u - 4) / focal, (v - 4) / focal, torch.ones(size, size)], -1)
    pose = torch.eye(4).repeat(4, 1, 1)
    pose[1, 0, 3] = 1.0  # 1 m of the 4 m that the image spans at 2 m
    pose[2, :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    depth = torch.full((4, size, size), 2.0)
    depth[3, :, :4] = 1.0
    points = torch.stack([ray * 2 @ pose[k, :3, :3].T + pose[k, :3, 3] for k in range(4)])
    points[3] = ray * depth[3, ..., None]
    intrinsics = torch.tensor([[focal, 0, 4], [0, focal, 4], [0, 0, 1]])
    share = pairs.covisibility(points, pose, depth, intrinsics)
    assert share[0, 1] == share[1, 0] == 0.75
    assert share[0, 2] == share[2, 0] == share[1, 2] == 0
    assert share[0, 3] == 0.5, "half of the wall is behind the screen"
    assert share[3, 0] == 1, "what is nearer than the wall hides it there, and counts as seen"


def test_neighbours_are_the_nearest_by_the_weaker_direction():
    share = torch.tensor([[1.0, 0.9, 0.4, 0.3], [0.1, 1.0, 0.2, 0.6], [0.5, 0.7, 1.0, 0.8], [0.3, 0.6, 0.9, 1.0]])
    before = share.clone()
    # Weaker directions: 01 .1, 02 .4, 03 .3, 12 .2, 13 .6, 23 .8.
    assert pairs.nearest(share, 1) == [(0, 2), (1, 3), (2, 0), (2, 3), (3, 1), (3, 2)]
    assert torch.equal(share, before)
    assert pairs.nearest(share, 3) == [(i, j) for i in range(4) for j in range(4) if i != j]


def test_every_view_has_its_neighbours_both_ways(share):
    graph = pairs.nearest(share, 4)
    degree = Counter(i for i, _ in graph)
    assert set(degree) == set(range(8)) and min(degree.values()) >= 4
    assert all((j, i) in graph and i != j for i, j in graph)
