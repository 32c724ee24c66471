//! `clearform bench tiles`: counts how much of what attention computes lies inside the disc. Nothing is timed.

use super::parse_grid;
use crate::args::TilesBenchArgs;
use crate::output::Output;
use anyhow::Context as _;
use clearform_attention::{Execution, Geometry, Policy, Radius, TileEfficiency, TileShape};
use serde::Serialize;
use std::fmt;

/// Prints one row for each grid, radius and pair of tiles.
pub fn run(args: &TilesBenchArgs, output: &Output) -> anyhow::Result<()> {
    let pairings = args.tiles.iter().map(|text| Ok((text, TilePairing::parse(text)?)));
    let pairings = pairings.collect::<anyhow::Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for grid in &args.grid {
        let geometry = Geometry::new(vec![parse_grid("--grid", grid)?]);
        for tokens in &args.radius {
            let radius = Radius::new(*tokens)?;
            let row = |(name, pairing): &(&String, TilePairing)| {
                TileRow::new(grid, radius, name, pairing.efficiency(&geometry, radius))
            };
            rows.extend(pairings.iter().map(row));
        }
    }
    output.result(&TileTable { rows })
}

/// Tiles of queries and of keys.
enum TilePairing {
    /// Given shapes: queries, keys.
    Shapes(TileShape, TileShape),
    /// Those of one of clearform's kernels.
    Kernel(Execution),
}

impl TilePairing {
    fn parse(text: &str) -> anyhow::Result<Self> {
        match text {
            "cpu" => return Ok(Self::Kernel(Execution::Cpu)),
            "gpu" => return Ok(Self::Kernel(Execution::Gpu)),
            _ => {}
        }
        let expected = || format!("--tiles {text:?}: expected HxW/HxW (queries/keys), cpu or gpu");
        let (queries, keys) = text.split_once('/').with_context(expected)?;
        let shape = |text| {
            let grid = parse_grid("--tiles", text)?;
            anyhow::Ok(TileShape::new(grid.height, grid.width)?)
        };
        Ok(Self::Shapes(shape(queries)?, shape(keys)?))
    }

    /// Efficiency over image tokens; text is left out.
    fn efficiency(&self, geometry: &Geometry, radius: Radius) -> TileEfficiency {
        match self {
            Self::Shapes(queries, keys) => TileEfficiency::of_tiles(geometry.grids()[0], radius, *queries, *keys),
            Self::Kernel(execution) => execution.efficiency(geometry, Policy::Clear { radius, pool: None }, 0),
        }
    }
}

#[derive(Debug, Serialize)]
struct TileRow {
    grid: String,
    radius: f64,
    tiles: String,
    inside_pairs: u64,
    visited_pairs: u64,
    efficiency: f64,
}

impl TileRow {
    fn new(grid: &str, radius: Radius, tiles: &str, efficiency: TileEfficiency) -> Self {
        Self {
            grid: grid.to_owned(),
            radius: radius.tokens(),
            tiles: tiles.to_owned(),
            inside_pairs: efficiency.inside,
            visited_pairs: efficiency.visited,
            efficiency: efficiency.ratio(),
        }
    }
}

#[derive(Debug, Serialize)]
struct TileTable {
    rows: Vec<TileRow>,
}

impl fmt::Display for TileTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>9} {:>5}  {:<13} {:>14} {:>14}  share", "grid", "r", "tiles", "in window", "visited")?;
        self.rows.iter().try_for_each(|row| {
            let TileRow { grid, radius, tiles, inside_pairs, visited_pairs, efficiency } = row;
            writeln!(
                f,
                "{grid:>9} {radius:>5}  {tiles:<13} {inside_pairs:>14} {visited_pairs:>14}  {:>4.0}%",
                100.0 * efficiency
            )
        })
    }
}
