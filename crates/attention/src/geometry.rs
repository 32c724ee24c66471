//! [`Geometry`]: the positions of the image tokens, and the order in which they are stored.

use crate::tiles::{CELL, SQUARE, TileOrder};
use crate::{AttentionError, Radius, TileEfficiency, TileShape, TokenGrid};
use candle_core::{DType, Result, Tensor, bail};
use clearform_ops::check_gpu_size;
use std::sync::{Arc, OnceLock};

/// The positions of the image tokens. A model permutes tokens to the order of 2-D tiles once at its embedding and back
/// once at its head, so that the window of a tile covers few tiles of keys, most of them entirely.
///
/// With several grids only rows and columns count: a token attends to the tokens of another grid around its own
/// position, as reference images that are aligned with the image need.
#[derive(Debug, Clone)]
pub struct Geometry {
    grids: Vec<TokenGrid>,
    text_mask: Option<TextMask>,
    order: Arc<TileOrder>,
}

/// A mask on its device, and its values on the host, which all layers need.
#[derive(Debug, Clone)]
struct TextMask {
    mask: Tensor,
    /// Read once, at first use, because reading waits for the device.
    rows: Arc<OnceLock<Vec<Vec<bool>>>>,
}

impl Geometry {
    /// A geometry of one or more grids in sequence order. Attention over a geometry without a grid is an error.
    pub fn new(grids: Vec<TokenGrid>) -> Self {
        Self::ordered(grids, SQUARE)
    }

    /// The same with tokens ordered by cells of another shape. It changes which pairs are computed, but results only by
    /// rounding. On a GPU the cells of [`Self::new`], 4 x 4, are the most efficient.
    ///
    /// # Errors
    /// A shape of other than 16 tokens, two of which fill the 32 lanes of the CPU's kernel.
    pub fn in_cells(grids: Vec<TokenGrid>, cell: TileShape) -> std::result::Result<Self, AttentionError> {
        let TileShape { height, width } = cell;
        if height * width != CELL {
            return Err(AttentionError::BadTile { height, width, expected: "16 tokens" });
        }
        Ok(Self::ordered(grids, cell))
    }

    fn ordered(grids: Vec<TokenGrid>, cell: TileShape) -> Self {
        let order = Arc::new(TileOrder::new(&grids, cell));
        Self { grids, text_mask: None, order }
    }

    /// Hides padded text. `mask` is (batch, text tokens), 1 for tokens and 0 for padding. It is read once, by the first
    /// layer that attends.
    #[must_use]
    pub fn with_text_mask(mut self, mask: Tensor) -> Self {
        self.text_mask = Some(TextMask { mask, rows: Arc::default() });
        self
    }

    /// The grids, in sequence order.
    pub fn grids(&self) -> &[TokenGrid] {
        &self.grids
    }

    /// The text mask, (batch, text tokens).
    pub fn text_mask(&self) -> Option<&Tensor> {
        self.text_mask.as_ref().map(|text| &text.mask)
    }

    /// Number of image tokens in all grids.
    pub fn tokens(&self) -> usize {
        self.grids.iter().map(|grid| grid.tokens()).sum()
    }

    /// The pairs that the CPU's kernel computes for `radius`, and those inside the disc.
    pub fn efficiency(&self, radius: Radius) -> TileEfficiency {
        self.order.efficiency(radius)
    }

    /// Permutes dimension 1 of `raster` from raster order to tile order; differentiable.
    ///
    /// # Shapes
    /// (batch, image tokens, ..) -> the same.
    ///
    /// # Errors
    /// A token count that is not this geometry's, or more elements than a GPU indexes.
    pub fn to_tiles(&self, raster: &Tensor) -> Result<Tensor> {
        // Every layer has tensors of this size, and candle's operations on them.
        check_gpu_size(raster)?;
        self.permute(raster, &self.order.raster_of, &self.order.tile_of)
    }

    /// The inverse of [`Self::to_tiles`].
    ///
    /// # Shapes
    /// (batch, image tokens, ..) -> the same.
    ///
    /// # Errors
    /// A token count that is not this geometry's.
    pub fn to_raster(&self, tiled: &Tensor) -> Result<Tensor> {
        self.permute(tiled, &self.order.tile_of, &self.order.raster_of)
    }

    /// For each batch entry, which text tokens are not padding; none without a mask.
    ///
    /// # Errors
    /// A mask of another shape.
    pub(crate) fn visible_text(&self, batch: usize, text: usize) -> Result<Option<Vec<Vec<bool>>>> {
        let Some(TextMask { mask, rows }) = &self.text_mask else { return Ok(None) };
        if mask.dims() != [batch, text] && mask.dims() != [1, text] {
            bail!("text mask {:?}: expected (batch, text tokens) = ({batch}, {text})", mask.dims());
        }
        let rows = match rows.get() {
            Some(rows) => rows,
            None => {
                let read = mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
                let is_visible = |row: &Vec<f32>| row.iter().map(|value| *value > 0.5).collect();
                rows.get_or_init(|| read.iter().map(is_visible).collect())
            }
        };
        Ok(Some(rows.iter().cycle().take(batch).cloned().collect()))
    }

    pub(crate) fn order(&self) -> &TileOrder {
        &self.order
    }

    fn permute(&self, x: &Tensor, from: &[u32], inverse: &[u32]) -> Result<Tensor> {
        if x.rank() < 2 || x.dim(1)? != from.len() {
            bail!("expected {} image tokens in dimension 1 for {:?}, found {:?}", from.len(), self.grids, x.dims());
        }
        #[cfg(feature = "cuda")]
        if let Some(out) = clearform_ops::cuda::permute(x, from, inverse)? {
            return Ok(out);
        }
        let _ = inverse;
        x.contiguous()?.index_select(&Tensor::new(from, x.device())?, 1)
    }
}
