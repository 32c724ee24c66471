//! [`bench_tiles`]: counts how much of what attention computes lies inside the disc. Nothing is timed.

use super::parse_grid;
use crate::{ClearformError, Result};
use clearform_attention::{Execution, Geometry, Policy, Radius, TileEfficiency, TileShape};
use serde::Serialize;
use std::fmt;

/// Grids, radii and tiles to count.
#[derive(Debug, Clone)]
pub struct TilesBench {
    /// Grids of image tokens, HEIGHTxWIDTH.
    pub grids: Vec<String>,
    /// Window radii, in tokens.
    pub radii: Vec<f64>,
    /// Tiles of queries and of keys (HxW/HxW), or `cpu` and `gpu` for those of clearform's kernels.
    pub tiles: Vec<String>,
}

/// Counts one row for each grid, radius and pair of tiles.
///
/// # Errors
/// A grid, radius or pair of tiles that is none.
pub fn bench_tiles(bench: &TilesBench) -> Result<TileTable> {
    let pairings = bench.tiles.iter().map(|text| Ok((text, TilePairing::parse(text)?)));
    let pairings = pairings.collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for grid in &bench.grids {
        let geometry = Geometry::new(vec![parse_grid("--grid", grid)?]);
        for tokens in &bench.radii {
            let radius = Radius::new(*tokens)?;
            let row = |(name, pairing): &(&String, TilePairing)| {
                TileRow::new(grid, radius, name, pairing.efficiency(&geometry, radius))
            };
            rows.extend(pairings.iter().map(row));
        }
    }
    Ok(TileTable { rows })
}

/// Tiles of queries and of keys.
enum TilePairing {
    /// Given shapes: queries, keys.
    Shapes(TileShape, TileShape),
    /// Those of one of clearform's kernels.
    Kernel(Execution),
}

impl TilePairing {
    fn parse(text: &str) -> Result<Self> {
        match text {
            "cpu" => return Ok(Self::Kernel(Execution::Cpu)),
            "gpu" => return Ok(Self::Kernel(Execution::Gpu)),
            _ => {}
        }
        let expected =
            || ClearformError::BadOption(format!("--tiles {text:?}: expected HxW/HxW (queries/keys), cpu or gpu"));
        let (queries, keys) = text.split_once('/').ok_or_else(expected)?;
        let shape = |text| {
            let grid = parse_grid("--tiles", text)?;
            Ok::<_, ClearformError>(TileShape::new(grid.height, grid.width)?)
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

/// One count.
#[derive(Debug, Serialize)]
pub struct TileRow {
    /// Image tokens.
    pub grid: String,
    /// Window radius, in tokens.
    pub radius: f64,
    /// Tiles of queries and of keys.
    pub tiles: String,
    /// Query-key pairs in the window.
    pub inside_pairs: u64,
    /// Pairs that are computed.
    pub visited_pairs: u64,
    /// The share of the second that the first is.
    pub efficiency: f64,
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

/// The result of [`bench_tiles`].
#[derive(Debug, Serialize)]
pub struct TileTable {
    /// One row for each grid, radius and pair of tiles.
    pub rows: Vec<TileRow>,
}

impl fmt::Display for TileTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>9} {:>5}  {:<13} {:>14} {:>14}  efficiency", "grid", "r", "tiles", "in window", "visited")?;
        self.rows.iter().try_for_each(|row| {
            let TileRow { grid, radius, tiles, inside_pairs, visited_pairs, efficiency } = row;
            writeln!(
                f,
                "{grid:>9} {radius:>5}  {tiles:<13} {inside_pairs:>14} {visited_pairs:>14}  {:>9.0}%",
                100.0 * efficiency
            )
        })
    }
}
