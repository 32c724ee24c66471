//! [`Geometry`]: where the image tokens lie, and the order they are held in. Knows no policy.

use crate::tiles::{CELL, SQUARE, TileOrder};
use crate::{AttentionError, Radius, TileEfficiency, TileShape};
use candle_core::{DType, Result, Tensor, bail};
use std::sync::{Arc, OnceLock};

/// A rectangle of image tokens, made by [`TokenGrid::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TokenGrid {
    /// Rows of tokens.
    pub height: usize,
    /// Tokens per row.
    pub width: usize,
}

impl TokenGrid {
    /// The most tokens along a side: squared distances then fit 32 bits.
    pub const LIMIT: usize = 1 << 14;

    /// A grid of `height` rows of `width` tokens.
    ///
    /// # Errors
    /// An extent of 0, or above [`Self::LIMIT`].
    pub fn new(height: usize, width: usize) -> std::result::Result<Self, AttentionError> {
        let fits = |extent| (1..=Self::LIMIT).contains(&extent);
        if fits(height) && fits(width) {
            Ok(Self { height, width })
        } else {
            Err(AttentionError::BadGrid { height, width, limit: Self::LIMIT })
        }
    }

    /// Tokens in it.
    pub fn tokens(self) -> usize {
        self.height * self.width
    }
}

/// Where the image tokens lie. Tokens are permuted to 2-D tiles once at embed and back once at head: the window of a
/// tile then touches few tiles of keys, most of them whole.
///
/// Where there are several grids, rows and columns alone count: a token sees those of another grid around its own
/// place there, as references that are aligned with the image need it.
#[derive(Debug, Clone)]
pub struct Geometry {
    grids: Vec<TokenGrid>,
    text_mask: Option<TextMask>,
    order: Arc<TileOrder>,
}

/// A mask, and what all layers want to know of it.
#[derive(Debug, Clone)]
struct TextMask {
    mask: Tensor,
    /// Read when it is first asked for: reading waits for a device.
    rows: Arc<OnceLock<Vec<Vec<bool>>>>,
}

impl Geometry {
    /// A geometry of one or more grids, one after the other in the sequence. Attention refuses one without a grid.
    pub fn new(grids: Vec<TokenGrid>) -> Self {
        Self::ordered(grids, SQUARE)
    }

    /// The same with tokens ordered by cells of another shape, which changes what is visited on the CPU and no result
    /// but for rounding. Kernels of a GPU take any order, but visit least with that of [`Self::new`], 4 x 4.
    ///
    /// # Errors
    /// A shape of other than 16 tokens, which is what the kernel's lanes hold twice.
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

    /// Hides padded text. `mask` is (batch, text tokens), 1 where a token counts and 0 where it is padding. It is read
    /// once, at the first layer that attends.
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

    /// Image tokens in all grids together.
    pub fn tokens(&self) -> usize {
        self.grids.iter().map(|grid| grid.tokens()).sum()
    }

    /// How much of what the kernel visits for `radius` lies inside the disc.
    pub fn share_inside(&self, radius: Radius) -> TileEfficiency {
        self.order.share_inside(radius)
    }

    /// Permutes dimension 1 of `raster` from raster order to tile order; differentiable.
    ///
    /// # Shapes
    /// (batch, image tokens, ..) -> the same.
    ///
    /// # Errors
    /// A token count that is not this geometry's.
    pub fn to_tiles(&self, raster: &Tensor) -> Result<Tensor> {
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

    /// Which text tokens count, batch by batch, or none where all do.
    pub(crate) fn visible_text(&self, batch: usize, text: usize) -> Result<Option<Vec<Vec<bool>>>> {
        let Some(TextMask { mask, rows }) = &self.text_mask else { return Ok(None) };
        if mask.dims() != [batch, text] && mask.dims() != [1, text] {
            bail!("text mask {:?}: expected (batch, text tokens) = ({batch}, {text})", mask.dims());
        }
        let rows = match rows.get() {
            Some(rows) => rows,
            None => {
                let read = mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
                let counts = |row: &Vec<f32>| row.iter().map(|value| *value > 0.5).collect();
                rows.get_or_init(|| read.iter().map(counts).collect())
            }
        };
        Ok(Some(rows.iter().cycle().take(batch).cloned().collect()))
    }

    pub(crate) fn order(&self) -> &TileOrder {
        &self.order
    }

    fn permute(&self, x: &Tensor, from: &[u32], inverse: &[u32]) -> Result<Tensor> {
        if x.rank() < 2 || x.dim(1)? != from.len() {
            bail!("{:?} image tokens: expected {} of {:?}", x.dims(), from.len(), self.grids);
        }
        #[cfg(feature = "cuda")]
        if let Some(out) = clearform_ops::cuda::permute(x, from, inverse)? {
            return Ok(out);
        }
        let _ = inverse;
        x.contiguous()?.index_select(&Tensor::new(from, x.device())?, 1)
    }
}
