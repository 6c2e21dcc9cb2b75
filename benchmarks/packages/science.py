"""Tables, time series, graphs as far as they are dense, operators and signals of the sciences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.packages.network import Inputs, Network, found, image, of, rows, signal, words


def adjacency(width: int) -> Callable[[int, int], Inputs]:
    """Nodes (batch, nodes, width) and a dense adjacency (batch, nodes, nodes)."""
    return lambda batch, size: (torch.randn(batch, size, width), torch.rand(batch, size, size).round())


class Dense(nn.Module):
    """Three dense layers of torch_geometric and a mean over nodes: the package has layers, and its examples write networks like this."""

    def __init__(self, kind: str) -> None:
        super().__init__()

        def layer(a: int, b: int) -> nn.Module:
            given = (nn.Sequential(nn.Linear(a, 24), nn.ReLU(), nn.Linear(24, b)),) if kind == "DenseGINConv" else (a, b)
            made: nn.Module = found(f"torch_geometric.nn:{kind}")(*given, **({"heads": 2, "concat": False} if "GAT" in kind else {}))
            return made

        self.first, self.second, self.third = layer(12, 32), layer(32, 32), layer(32, 24)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor, adj: torch.Tensor) -> torch.Tensor:
        x = self.first(x, adj).relu()
        b, n, c = x.size()
        x = self.norm(x.view(-1, c)).view(b, n, c)
        x = self.second(x, adj).relu()
        y: torch.Tensor = self.head(self.third(x, adj).relu().mean(dim=1))
        return y


def numbers_and_categories(batch: int, size: int) -> Inputs:
    return torch.randn(batch, 6), torch.randint(0, 3, (batch, 2))


def categories_and_numbers(batch: int, size: int) -> Inputs:
    return torch.randint(0, 3, (batch, 2)), torch.randn(batch, 6)


def networks() -> Iterator[Network]:
    rtdl = "rtdl_revisiting_models:"
    yield Network(
        "rtdl-revisiting-models",
        "MLP for tables",
        of(f"{rtdl}MLP", d_in=10, d_out=3, n_blocks=3, d_block=48, dropout=0.1),
        rows(10),
        1,
        1,
        4,
    )
    res = {
        "d_in": 10,
        "d_out": 3,
        "n_blocks": 2,
        "d_block": 32,
        "d_hidden": None,
        "d_hidden_multiplier": 2.0,
        "dropout1": 0.1,
        "dropout2": 0.0,
    }
    yield Network("rtdl-revisiting-models", "ResNet for tables", of(f"{rtdl}ResNet", **res), rows(10), 1, 1, 4)
    ft = {
        "n_cont_features": 6,
        "cat_cardinalities": [3, 3],
        "d_out": 3,
        "n_blocks": 2,
        "d_block": 32,
        "attention_n_heads": 4,
        "attention_dropout": 0.1,
    }
    ft |= {"ffn_d_hidden": None, "ffn_d_hidden_multiplier": 2.0, "ffn_dropout": 0.1, "residual_dropout": 0.0}
    yield Network("rtdl-revisiting-models", "FTTransformer", of(f"{rtdl}FTTransformer", **ft), numbers_and_categories, 1, 1, 4)
    yield Network("tabm", "TabM", of("tabm:TabM.make", n_num_features=10, d_out=3, n_blocks=2, d_block=32, k=4), rows(10), 1, 1, 4)
    tab = {"categories": (3, 3), "num_continuous": 6, "dim": 32, "dim_out": 3, "depth": 2, "heads": 4, "dim_head": 8}
    yield Network(
        "tab-transformer-pytorch",
        "TabTransformer",
        of("tab_transformer_pytorch:TabTransformer", **tab, mlp_act=nn.ReLU()),
        categories_and_numbers,
        1,
        1,
        4,
    )
    yield Network(
        "tab-transformer-pytorch",
        "FTTransformer of tab-transformer",
        of("tab_transformer_pytorch:FTTransformer", **tab),
        categories_and_numbers,
        1,
        1,
        4,
    )
    net = {"input_dim": 10, "output_dim": 3, "n_d": 16, "n_a": 16, "n_steps": 3, "group_attention_matrix": torch.eye(10)}
    yield Network("pytorch-tabnet", "TabNet", of("pytorch_tabnet.tab_network:TabNet", **net), rows(10), 1, 1, 8)
    for kind in ("DenseGCNConv", "DenseSAGEConv", "DenseGINConv", "DenseGATConv"):
        yield Network("torch-geometric", kind, lambda kind=kind: Dense(kind), adjacency(12), 8, 12)  # type: ignore[misc]
    fno = {"n_modes": (6, 6), "hidden_channels": 16, "in_channels": 2, "out_channels": 1, "n_layers": 2}
    yield Network("neuraloperator", "FNO", of("neuralop.models:FNO", **fno), image(2), 16, 24)
    yield Network("pytorch-tcn", "TCN", of("pytorch_tcn:TCN", num_inputs=6, num_channels=[16, 24, 32], kernel_size=3), signal(6), 24, 32)
    brain = "braindecode.models:"
    eeg = {"n_chans": 8, "n_outputs": 3, "n_times": 400, "sfreq": 100}
    for name in ("EEGNet", "ShallowFBCSPNet", "Deep4Net", "EEGConformer", "ATCNet"):
        yield Network("braindecode", name, of(f"{brain}{name}", **eeg), signal(8), 400, 400)
    yield Network("fair-esm", "ESM-2", of("esm.model.esm2:ESM2", num_layers=2, embed_dim=40, attention_heads=4), words(20), 12, 20)
    yield Network(
        "lpips",
        "LPIPS",
        of("lpips:LPIPS", net="squeeze", pretrained=False, pnet_rand=True, verbose=False),
        lambda b, n: (torch.rand(b, 3, n, n), torch.rand(b, 3, n, n)),
        64,
        96,
    )
