"""What it takes cell-load to start: seconds of the processor and peak memory until its first batch of two sets of 128.

Run in an environment with cell-load, on a TOML file of its own (a folder of .h5ad files with target_gene, cell_type and
batch in obs, as `scale.py` writes them):

    OMP_NUM_THREADS=1 python benchmarks/peer_start.py screen.toml
"""

import resource
import sys
import time

from cell_load.data_modules.perturbation_dataloader import PerturbationDataModule

SET_SIZE = 128


def main() -> None:
    imports = time.process_time()
    cells = PerturbationDataModule(
        toml_config_path=sys.argv[1],
        output_space="all",
        pert_col="target_gene",
        cell_type_key="cell_type",
        batch_col="batch",
        control_pert="control",
        basal_mapping_strategy="random",
        num_workers=0,
        batch_size=2,
        cell_sentence_len=SET_SIZE,
    )
    cells.setup()
    batch = next(iter(cells.train_dataloader()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"{time.process_time():.1f} s, imports {imports:.1f}; {peak:,.0f} MB; cells {batch['pert_cell_emb'].shape}")


if __name__ == "__main__":
    main()
