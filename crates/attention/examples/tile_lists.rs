//! Writes the lists that the product gives to the kernels of a GPU, for kernels/checks/bench.cpp, which times those
//! very lists: `tile_lists FOLDER`, a file for each case.
//!
//! A file has a line `height width text pooled limit` (limit 0: full attention), the lists by queries and by keys as
//! [`VisitLists`](clearform_kernels::clear_attention::VisitLists) are printed, and the pairs of query tiles with their
//! visits, each table after its length.

use clearform_attention::{Geometry, Radius, TokenGrid, kernel_lists};
use clearform_kernels::clear_attention::{ListRows, WorkPairs};
use std::error::Error;
use std::fmt::{self, Write as _};
use std::path::PathBuf;

const TEXT: usize = 512;

/// Side of the square grid, and the radius; full attention without one.
const CASES: [(usize, Option<u32>); 5] = [(64, Some(16)), (128, Some(16)), (512, Some(16)), (64, None), (128, None)];

fn main() -> Result<(), Box<dyn Error>> {
    let folder: PathBuf = std::env::args_os().nth(1).ok_or("usage: tile_lists FOLDER")?.into();
    std::fs::create_dir_all(&folder)?;
    for (side, radius) in CASES {
        let name = radius.map_or("full".to_owned(), |radius| format!("r{radius}"));
        std::fs::write(folder.join(format!("{side}x{side}-{name}.txt")), printed(side, radius)?)?;
    }
    Ok(())
}

/// The text of a case's file.
fn printed(side: usize, radius: Option<u32>) -> Result<String, Box<dyn Error>> {
    let geometry = Geometry::new(vec![TokenGrid::new(side, side)?]);
    let window = radius.map(|radius| Radius::new(radius.into())).transpose()?;
    let [queries, keys] = [ListRows::Queries, ListRows::Keys].map(|rows| kernel_lists(&geometry, window, TEXT, rows));
    let limit = radius.map_or(0, |radius| radius * radius);
    let mut out = format!("{side} {side} {TEXT} 0 {limit}\n{queries}{keys}");
    write_pairs(&mut out, &WorkPairs::new(&queries))?;
    Ok(out)
}

fn write_pairs(out: &mut String, pairs: &WorkPairs) -> fmt::Result {
    writeln!(out, "{}", pairs.pairs.len())?;
    for pair in &pairs.pairs {
        let ([first, second], [first_end, second_end]) = (pair.works, pair.ends);
        writeln!(out, "{first} {second} {} {} {first_end} {second_end}", pair.begin, pair.end)?;
    }
    writeln!(out, "{}", pairs.visits.len())?;
    pairs.visits.iter().try_for_each(|visit| writeln!(out, "{} {} {}", visit.first, visit.masks[0], visit.masks[1]))
}
