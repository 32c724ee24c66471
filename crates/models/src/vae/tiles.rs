//! [`decode`]: an image in tiles whose memory does not grow with it.
//!
//! Convolutions read a few pixels around a tile, so those are computed with it and dropped. Two things need the whole
//! image: the means and variances of group norms, and attention. Both come from a first pass over samples of it, all
//! tiles share them, and so nothing is to be seen where tiles meet. Blending overlapping tiles, as diffusers does, hides
//! the edges between tiles that differ; here they do not.

use super::decoder::Decoder;
use super::layers::AttentionContext;
use super::padded_tile::{KeptMoments, Margins, PaddedTile, SharedMoments};
use candle_core::{Device, Result, Tensor};
use clearform_ops::ChannelAffine;
use std::ops::{ControlFlow, Range};

/// Latent pixels, at most, that group norms are measured on and that are attended to: 1024 x 1024 pixels of most models,
/// up to which the whole image is measured.
const SAMPLED: usize = 128 * 128;

/// Samples of an image that is larger: 16 of 32 x 32, spread evenly, so that every part of the picture has one near.
const SAMPLES: usize = 16;
const SAMPLE_EDGE: usize = 32;

/// How far the decoding of an image has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileProgress {
    /// Tiles that are decoded.
    pub done: usize,
    /// All tiles.
    pub total: usize,
}

/// Decodes `latents` in tiles of `tile` latent pixels a side. `None` if `progress` cancels.
///
/// # Shapes
/// latents (1, channels, height, width) -> (1, 3, height · upscale, width · upscale) on the CPU.
pub(super) fn decode(
    decoder: &Decoder,
    latents: &Tensor,
    tile: usize,
    progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let (_, _, height, width) = latents.dims4()?;
    let starts = |edge: usize| (0..edge).step_by(tile).map(move |start| start..edge.min(start + tile));
    let tiles: Vec<Area> = starts(height)
        .flat_map(|rows| starts(width).map(move |columns| Area { rows: rows.clone(), columns }))
        .collect();
    let tiled = TiledDecoder::new(decoder, latents, &tiles)?;
    let mut rows = Vec::new();
    let mut row = Vec::new();
    for (index, area) in tiles.iter().enumerate() {
        row.push(tiled.decode(area)?);
        if area.columns.end == width {
            rows.push(Tensor::cat(&std::mem::take(&mut row), 3)?);
        }
        if progress(TileProgress { done: index + 1, total: tiles.len() }).is_break() {
            return Ok(None);
        }
    }
    Tensor::cat(&rows, 2).map(Some)
}

/// An area of an image, in latent pixels.
#[derive(Debug, Clone, PartialEq)]
struct Area {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Area {
    /// The area of `latents`, with up to `reach` pixels around it.
    fn part(&self, latents: &Tensor, reach: usize) -> Result<PaddedTile> {
        let (_, _, height, width) = latents.dims4()?;
        let margins = |range: &Range<usize>, edge: usize| [range.start.min(reach), (edge - range.end).min(reach)];
        let margins = Margins { rows: margins(&self.rows, height), columns: margins(&self.columns, width) };
        let narrow = |x: &Tensor, dimension: usize, range: &Range<usize>, [before, after]: [usize; 2]| {
            x.narrow(dimension, range.start - before, range.len() + before + after)
        };
        let x = narrow(&narrow(latents, 2, &self.rows, margins.rows)?, 3, &self.columns, margins.columns)?;
        Ok(PaddedTile { x: x.contiguous()?, margins })
    }
}

/// A decoder, with what the tiles of an image share.
struct TiledDecoder<'a> {
    decoder: &'a Decoder,
    latents: &'a Tensor,
    reach: usize,
    /// Of group norms before and after the attention.
    affines: [Vec<ChannelAffine>; 2],
    context: Option<AttentionContext>,
}

impl<'a> TiledDecoder<'a> {
    /// Measures what `tiles` share.
    fn new(decoder: &'a Decoder, latents: &'a Tensor, tiles: &[Area]) -> Result<Self> {
        let reach = decoder.reach();
        let samples = samples(latents, reach.latents)?;
        let mut moments = SharedMoments::default();
        let entered = decoder.enter(samples, &mut moments)?;
        let before = std::mem::take(&mut moments.affines);
        let context = context(decoder, latents, tiles, &before)?;
        decoder.leave(entered, context.as_ref(), &mut moments)?;
        Ok(Self { decoder, latents, reach: reach.latents, affines: [before, moments.affines], context })
    }

    fn decode(&self, area: &Area) -> Result<Tensor> {
        let [before, after] = self.affines.each_ref().map(|affines| KeptMoments(affines.iter()));
        let entered = self.decoder.enter(area.part(self.latents, self.reach)?, &mut { before })?;
        self.decoder.leave(entered, self.context.as_ref(), &mut { after })?.x.to_device(&Device::Cpu)
    }
}

/// Parts of an image that stand for all of it, as samples of a batch, with `reach` pixels around them. Of a small image
/// that is the whole.
fn samples(latents: &Tensor, reach: usize) -> Result<PaddedTile> {
    let (_, _, height, width) = latents.dims4()?;
    if height * width <= SAMPLED {
        return Ok(PaddedTile::whole(latents.clone()));
    }
    // As many along each side as the sides are long, and 16 in all.
    let across = ((SAMPLES * width) as f64 / height as f64).sqrt().round().clamp(1.0, SAMPLES as f64) as usize;
    let [rows, columns] = [spread(height, SAMPLES / across, reach), spread(width, across, reach)];
    let parts = rows
        .iter()
        .flat_map(|rows| columns.iter().map(|columns| Area { rows: rows.clone(), columns: columns.clone() }));
    let parts = parts.map(|area| area.part(latents, reach)).collect::<Result<Vec<_>>>()?;
    let margins = parts[0].margins;
    let tensors: Vec<&Tensor> = parts.iter().map(|part| &part.x).collect();
    Ok(PaddedTile { x: Tensor::cat(&tensors, 0)?, margins })
}

/// `count` ranges of an edge, spread evenly and all with the same margins of `reach`; the whole of a short edge.
fn spread(edge: usize, count: usize, reach: usize) -> Vec<Range<usize>> {
    let length = SAMPLE_EDGE + 2 * reach;
    if edge <= length {
        return std::iter::once(0..edge).collect();
    }
    let first = |index: usize| match count {
        0 | 1 => (edge - length) / 2,
        _ => index * (edge - length) / (count - 1),
    };
    (0..count.max(1)).map(|index| first(index) + reach..first(index) + reach + SAMPLE_EDGE).collect()
}

/// What every pixel attends to: pixels in equal steps over the image, or all of a small one.
fn context(
    decoder: &Decoder,
    latents: &Tensor,
    tiles: &[Area],
    affines: &[ChannelAffine],
) -> Result<Option<AttentionContext>> {
    let (_, _, height, width) = latents.dims4()?;
    let step = (1..).find(|step| height.div_ceil(*step) * width.div_ceil(*step) <= SAMPLED).unwrap_or(1);
    let mut attended = Vec::new();
    for area in tiles {
        let mut moments = KeptMoments(affines.iter());
        let entered = decoder.enter(area.part(latents, decoder.reach().enter)?, &mut moments)?;
        let Some(tokens) = entered.tokens else { return Ok(None) };
        let indices = sampled_tokens(area, &entered.part, step)?;
        if !indices.is_empty() {
            attended.push(tokens.index_select(&Tensor::new(indices, latents.device())?, 1)?);
        }
    }
    decoder.context(&Tensor::cat(&attended, 1)?)
}

/// The tokens of `part`, which is that of `area`, whose row and column in the image are multiples of `step`.
fn sampled_tokens(area: &Area, part: &PaddedTile, step: usize) -> Result<Vec<u32>> {
    let width = part.x.dim(3)?;
    let Margins { rows: [above, _], columns: [left, _] } = part.margins;
    let is_sampled = |index: &usize| index.is_multiple_of(step);
    let rows = area.rows.clone().filter(is_sampled);
    Ok(rows
        .flat_map(|row| {
            let start = (row - area.rows.start + above) * width + left;
            area.columns.clone().filter(is_sampled).map(move |column| (start + column - area.columns.start) as u32)
        })
        .collect())
}
