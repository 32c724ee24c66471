//! [`compute`]: an image decoded or encoded in tiles, whose memory does not grow with it.
//!
//! Convolutions read a few pixels around a tile, so those are computed with it and dropped. Two things need the whole
//! image: the means and variances of group norms, and attention. Both come from a first pass, all tiles share them, and so
//! nothing is to be seen where tiles meet. The first pass goes over the whole image if that fits into memory, else over
//! samples of it and then, with what these gave, over all tiles. Blending overlapping tiles, as diffusers does, hides
//! the edges between tiles that differ; here they do not.

use super::layers::AttentionContext;
use super::levels::MidBlock;
use super::padded_tile::{KeptMoments, Margins, NormMoments, OwnMoments, PaddedTile, RemeasuredMoments, SharedMoments};
use candle_core::{Device, Result, Tensor};
use clearform_ops::ChannelAffine;
use std::ops::{ControlFlow, Range};

/// A decoder or an encoder, as far as its tiles need to know it.
pub(super) trait TiledNetwork {
    /// Pixels of what it reads along the side of a latent pixel.
    fn input_scale(&self) -> usize;

    /// How many latent pixels around a part are read, in all and by [`Self::enter`].
    fn reach(&self) -> [usize; 2];

    /// The part before its attention.
    fn enter(&self, tile: PaddedTile, moments: &mut dyn NormMoments) -> Result<Entered>;

    /// The block with the attention.
    fn middle(&self) -> &MidBlock;

    /// The part from its attention on, which drops the margins.
    fn leave(
        &self,
        entered: Entered,
        context: Option<&AttentionContext>,
        moments: &mut dyn NormMoments,
    ) -> Result<PaddedTile>;

    /// An image that is computed whole.
    fn whole(&self, input: &Tensor) -> Result<Tensor> {
        let entered = self.enter(PaddedTile::whole(input.clone()), &mut OwnMoments)?;
        let context = entered.tokens.as_ref().map(|tokens| self.middle().context(tokens)).transpose()?.flatten();
        Ok(self.leave(entered, context.as_ref(), &mut OwnMoments)?.x)
    }
}

/// A part of an image before the attention.
pub(super) struct Entered {
    pub tile: PaddedTile,
    /// Its pixels as attention reads them, if there is one.
    pub tokens: Option<Tensor>,
}

/// Samples of an image that is too large to be measured whole: spread evenly, so that every part of the picture has one
/// near.
const SAMPLES: usize = 16;

/// Channels of all pixels together, at most, that are attended to: 128 x 128 latent pixels of most models. More would
/// take longer than all convolutions.
const ATTENDED: usize = 128 * 128 * 512;

/// The sizes of tiles, in latent pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileSizes {
    /// Side of a tile.
    pub tile: usize,
    /// How many are measured at a time, at most. Of an image with no more the whole is measured.
    pub measured: usize,
}

/// What a network reads.
#[derive(Clone, Copy)]
pub(super) struct TiledInput<'a> {
    /// (1, channels, height, width).
    pub pixels: &'a Tensor,
    /// Pixels along the side of a latent pixel.
    pub scale: usize,
}

impl TiledInput<'_> {
    /// Latent pixels along its sides.
    pub fn size(self) -> Result<[usize; 2]> {
        let (_, _, height, width) = self.pixels.dims4()?;
        Ok([height / self.scale, width / self.scale])
    }
}

/// How far an image has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileProgress {
    /// Tiles that are done.
    pub done: usize,
    /// All tiles; of an image that does not fit into memory twice as many, since each is measured first.
    pub total: usize,
}

/// What `network` makes of `input`, in tiles. `None` if `progress` cancels.
///
/// # Shapes
/// input (1, channels, height, width), latents or an image -> as the network, on the CPU.
pub(super) fn compute(
    network: &dyn TiledNetwork,
    input: &Tensor,
    sizes: TileSizes,
    progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let input = TiledInput { pixels: input, scale: network.input_scale() };
    let [height, width] = input.size()?;
    let tiles = Area::tiles([height, width], sizes.tile);
    let mut measured = MeasuredNetwork::new(network, input, &tiles, sizes.measured)?;
    let passes = if height * width <= sizes.measured { 1 } else { 2 };
    let total = passes * tiles.len();
    if passes > 1 && measured.remeasure(&tiles, &mut |done| progress(TileProgress { done, total }))?.is_break() {
        return Ok(None);
    }
    let before = total - tiles.len();
    assemble(&tiles, width, &|area| measured.compute(area), &mut |TileProgress { done, .. }| {
        progress(TileProgress { done: before + done, total })
    })
}

/// What `compute` makes of each image of a batch, together. `None` if it does of one.
pub(super) fn each_image(
    images: &Tensor,
    mut compute: impl FnMut(&Tensor) -> Result<Option<Tensor>>,
) -> Result<Option<Tensor>> {
    let computed = (0..images.dim(0)?).map(|index| compute(&images.narrow(0, index, 1)?));
    let computed: Option<Vec<Tensor>> = computed.collect::<Result<_>>()?;
    computed.map(|images| Tensor::cat(&images, 0)).transpose()
}

/// The image whose `tiles`, areas row by row of an image `width` latent pixels wide, `compute` computes. `None` if
/// `progress` cancels.
pub(super) fn assemble(
    tiles: &[Area],
    width: usize,
    compute: &dyn Fn(&Area) -> Result<Tensor>,
    progress: &mut dyn FnMut(TileProgress) -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let mut rows = Vec::new();
    let mut row = Vec::new();
    for (index, area) in tiles.iter().enumerate() {
        row.push(compute(area)?);
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
pub(super) struct Area {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Area {
    /// The tiles of `tile` latent pixels a side that make up an image of this height and width, row by row.
    pub fn tiles([height, width]: [usize; 2], tile: usize) -> Vec<Self> {
        let starts = |edge: usize| (0..edge).step_by(tile).map(move |start| start..edge.min(start + tile));
        let in_row = |rows: Range<usize>| starts(width).map(move |columns| Self { rows: rows.clone(), columns });
        starts(height).flat_map(in_row).collect()
    }

    /// The area of `input`, with up to `reach` latent pixels around it.
    pub fn tile(&self, input: TiledInput, reach: usize) -> Result<PaddedTile> {
        let [height, width] = input.size()?;
        let margins = |range: &Range<usize>, edge: usize| {
            [range.start.min(reach), (edge - range.end).min(reach)].map(|margin| margin * input.scale)
        };
        let margins = Margins { rows: margins(&self.rows, height), columns: margins(&self.columns, width) };
        let narrow = |x: &Tensor, dimension: usize, range: &Range<usize>, [before, after]: [usize; 2]| {
            x.narrow(dimension, range.start * input.scale - before, range.len() * input.scale + before + after)
        };
        let x = narrow(&narrow(input.pixels, 2, &self.rows, margins.rows)?, 3, &self.columns, margins.columns)?;
        Ok(PaddedTile { x: x.contiguous()?, margins })
    }
}

/// A network, with what the tiles of an image share.
struct MeasuredNetwork<'a> {
    network: &'a dyn TiledNetwork,
    input: TiledInput<'a>,
    /// Latent pixels around a tile that are read.
    reach: usize,
    /// Of group norms before and after the attention.
    affines: [Vec<ChannelAffine>; 2],
    context: Option<AttentionContext>,
}

impl<'a> MeasuredNetwork<'a> {
    /// Measures what `tiles` share.
    fn new(network: &'a dyn TiledNetwork, input: TiledInput<'a>, tiles: &[Area], measured: usize) -> Result<Self> {
        let [reach, _] = network.reach();
        let samples = samples(input, reach, measured)?;
        let mut moments = SharedMoments::default();
        let entered = network.enter(samples, &mut moments)?;
        let before = std::mem::take(&mut moments.affines);
        let context = context(network, input, tiles, &before)?;
        network.leave(entered, context.as_ref(), &mut moments)?;
        Ok(Self { network, input, reach, affines: [before, moments.affines], context })
    }

    /// Measures all of `tiles` in the place of samples. A norm is measured with what those before it were measured to
    /// be, so this is not exactly what the whole image has, but near it. `progress` has the number of tiles that are
    /// measured, and may cancel.
    fn remeasure(
        &mut self,
        tiles: &[Area],
        progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let used = self.affines.clone();
        let [mut before, mut after] = used.each_ref().map(|used| RemeasuredMoments::new(used));
        for (index, area) in tiles.iter().enumerate() {
            let entered = self.network.enter(area.tile(self.input, self.reach)?, before.restart())?;
            self.network.leave(entered, self.context.as_ref(), after.restart())?;
            if progress(index + 1).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        self.context = context(self.network, self.input, tiles, &before.affines)?;
        self.affines = [before.affines, after.affines];
        Ok(ControlFlow::Continue(()))
    }

    fn compute(&self, area: &Area) -> Result<Tensor> {
        let [before, after] = self.affines.each_ref().map(|affines| KeptMoments(affines.iter()));
        let entered = self.network.enter(area.tile(self.input, self.reach)?, &mut { before })?;
        self.network.leave(entered, self.context.as_ref(), &mut { after })?.x.to_device(&Device::Cpu)
    }
}

/// Parts of an image that stand for all of it, as samples of a batch, with `reach` pixels around them. Of a small image
/// of at most `measured` latent pixels that is the whole.
fn samples(input: TiledInput, reach: usize, measured: usize) -> Result<PaddedTile> {
    let [height, width] = input.size()?;
    if height * width <= measured {
        return Ok(PaddedTile::whole(input.pixels.clone()));
    }
    // With the pixels around them that the last levels still read, samples are a little larger.
    let length = ((measured as f64 / SAMPLES as f64).sqrt() as usize).saturating_sub(2).max(1);
    // As many along each side as the sides are long, and 16 in all.
    let across = ((SAMPLES * width) as f64 / height as f64).sqrt().round().clamp(1.0, SAMPLES as f64) as usize;
    let rows = SampleRanges { count: SAMPLES / across, length, reach }.along(height);
    let columns = SampleRanges { count: across, length, reach }.along(width);
    let parts = rows
        .iter()
        .flat_map(|rows| columns.iter().map(|columns| Area { rows: rows.clone(), columns: columns.clone() }));
    let parts = parts.map(|area| area.tile(input, reach)).collect::<Result<Vec<_>>>()?;
    let margins = parts[0].margins;
    let tensors: Vec<&Tensor> = parts.iter().map(|tile| &tile.x).collect();
    Ok(PaddedTile { x: Tensor::cat(&tensors, 0)?, margins })
}

/// The samples along one side of an image.
struct SampleRanges {
    count: usize,
    length: usize,
    /// Pixels around each.
    reach: usize,
}

impl SampleRanges {
    /// Ranges of an edge, spread evenly and all with the same margins; the whole of a short edge.
    fn along(self, edge: usize) -> Vec<Range<usize>> {
        let Self { count, length, reach } = self;
        let padded = length + 2 * reach;
        if edge <= padded {
            return std::iter::once(0..edge).collect();
        }
        let first = |index: usize| match count {
            0 | 1 => (edge - padded) / 2,
            _ => index * (edge - padded) / (count - 1),
        };
        (0..count.max(1)).map(|index| first(index) + reach..first(index) + reach + length).collect()
    }
}

/// What every pixel attends to: pixels in equal steps over the image, or all of a small one.
fn context(
    network: &dyn TiledNetwork,
    input: TiledInput,
    tiles: &[Area],
    affines: &[ChannelAffine],
) -> Result<Option<AttentionContext>> {
    let [height, width] = input.size()?;
    let most = ATTENDED / network.middle().channels().max(1);
    let step = (1..).find(|step| height.div_ceil(*step) * width.div_ceil(*step) <= most).unwrap_or(1);
    let mut attended = Vec::new();
    for area in tiles {
        let mut moments = KeptMoments(affines.iter());
        let entered = network.enter(area.tile(input, network.reach()[1])?, &mut moments)?;
        let Some(tokens) = entered.tokens else { return Ok(None) };
        let indices = sampled_tokens(area, &entered.tile, step)?;
        if !indices.is_empty() {
            attended.push(tokens.index_select(&Tensor::new(indices, input.pixels.device())?, 1)?);
        }
    }
    network.middle().context(&Tensor::cat(&attended, 1)?)
}

/// The tokens of `part`, which is that of `area`, whose row and column in the image are multiples of `step`.
fn sampled_tokens(area: &Area, tile: &PaddedTile, step: usize) -> Result<Vec<u32>> {
    let width = tile.x.dim(3)?;
    let Margins { rows: [above, _], columns: [left, _] } = tile.margins;
    let is_sampled = |index: &usize| index.is_multiple_of(step);
    let rows = area.rows.clone().filter(is_sampled);
    Ok(rows
        .flat_map(|row| {
            let start = (row - area.rows.start + above) * width + left;
            area.columns.clone().filter(is_sampled).map(move |column| (start + column - area.columns.start) as u32)
        })
        .collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vae::{AutoencoderKl, VaeConfig, VaePrecision};
    use clearform_ops::TorchGenerator;
    use clearform_weights::Checkpoint;
    use std::path::Path;

    fn autoencoder() -> AutoencoderKl {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/components/generation5/vae-flux");
        let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        AutoencoderKl::build(VaeConfig::new(&config).unwrap(), &Checkpoint::open(&folder).unwrap(), VaePrecision::F32)
            .unwrap()
    }

    /// Noise is everywhere alike, so samples of it measure what the whole does, but for chance.
    #[test]
    fn tiles_of_an_image_that_is_sampled_are_near_it_and_have_no_seams() {
        let vae = autoencoder();
        let latents = TorchGenerator::new(0).randn((1, vae.config().latent_channels, 96, 96)).unwrap();
        let whole = vae.decoder.whole(&latents).unwrap();
        let sizes = TileSizes { tile: 40, measured: 96 * 96 / 4 };
        let tiled = compute(&vae.decoder, &latents, sizes, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
        assert_eq!(tiled.dims(), whole.dims());
        let difference = (&tiled - &whole).unwrap();
        let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let share = norm(&difference) / norm(&whole);
        assert!(share > 0.0 && share < 0.15, "{share}");
        // Across a seam the difference changes as little as elsewhere.
        let edge = 40 * vae.config().downscale();
        let height = whole.dim(2).unwrap();
        let upper = difference.narrow(2, 0, height - 1).unwrap();
        let steps = (difference.narrow(2, 1, height - 1).unwrap() - upper).unwrap();
        let seam = norm(&steps.narrow(2, edge - 1, 1).unwrap());
        let usual = norm(&steps) / (height as f32 - 1.0).sqrt();
        assert!(seam < 2.0 * usual, "{seam} at the seam, {usual} elsewhere");
    }

    #[test]
    fn samples_are_spread_over_an_edge() {
        let starts = |count, edge| {
            let ranges = SampleRanges { count, length: 10, reach: 4 }.along(edge);
            ranges.into_iter().map(|range| (range.start, range.end)).collect::<Vec<_>>()
        };
        assert_eq!(starts(3, 100), [(4, 14), (45, 55), (86, 96)]);
        assert_eq!(starts(3, 18), [(0, 18)]);
        assert_eq!(starts(1, 100), [(45, 55)]);
    }
}
