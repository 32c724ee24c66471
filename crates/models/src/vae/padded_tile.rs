//! [`PaddedTile`]: a part of an image on its way through the decoder, and [`NormMoments`], what its group norms go by.

use crate::layers::GroupNorm;
use candle_core::{Result, Tensor};
use clearform_ops::{ChannelAffine, GroupMoments};

/// Pixels above, below, left and right of a part that are only there because convolutions read them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Margins {
    pub rows: [usize; 2],
    pub columns: [usize; 2],
}

/// A part of an image, or of several.
#[derive(Debug, Clone)]
pub(super) struct PaddedTile {
    /// (batch, channels, height, width), with the margins.
    pub x: Tensor,
    pub margins: Margins,
}

impl PaddedTile {
    /// A whole image, which has no margins.
    pub fn whole(x: Tensor) -> Self {
        Self { x, margins: Margins::default() }
    }

    /// The part with margins of at most `most` pixels.
    pub fn cropped(self, most: usize) -> Result<Self> {
        let Margins { rows, columns } = self.margins;
        let margins = Margins { rows: rows.map(|side| side.min(most)), columns: columns.map(|side| side.min(most)) };
        if margins == self.margins {
            return Ok(self);
        }
        let crop = |x: &Tensor, dimension: usize, [before, after]: [usize; 2], kept: [usize; 2]| {
            let [first, last] = [before - kept[0], after - kept[1]];
            x.narrow(dimension, first, x.dim(dimension)? - first - last)
        };
        let x = crop(&crop(&self.x, 2, rows, margins.rows)?, 3, columns, margins.columns)?.contiguous()?;
        Ok(Self { x, margins })
    }

    /// The part after `halve` has halved its height and width. Margins are even.
    pub fn halved(self, halve: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let Margins { rows, columns } = self.margins;
        let margins = Margins { rows: rows.map(|side| side / 2), columns: columns.map(|side| side / 2) };
        Ok(Self { x: halve(&self.x)?, margins })
    }

    /// The part after `enlarge` has doubled its height and width.
    pub fn enlarged(self, enlarge: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let Margins { rows, columns } = self.margins;
        let margins = Margins { rows: rows.map(|side| 2 * side), columns: columns.map(|side| 2 * side) };
        Ok(Self { x: enlarge(&self.x)?, margins })
    }
}

/// Where the group norms of a network take their means and variances from.
pub(super) trait NormMoments {
    /// What `norm` does to each channel of `tile`.
    fn affine(&mut self, norm: &GroupNorm, tile: &PaddedTile) -> Result<ChannelAffine>;
}

/// Those of each image itself.
pub(super) struct OwnMoments;

impl NormMoments for OwnMoments {
    fn affine(&mut self, norm: &GroupNorm, tile: &PaddedTile) -> Result<ChannelAffine> {
        norm.affine(&GroupMoments::of(&tile.x, norm.groups)?)
    }
}

/// Those of several parts together, without their margins. It keeps what each norm did, in the order of the decoder.
#[derive(Default)]
pub(super) struct SharedMoments {
    pub affines: Vec<ChannelAffine>,
}

impl NormMoments for SharedMoments {
    fn affine(&mut self, norm: &GroupNorm, tile: &PaddedTile) -> Result<ChannelAffine> {
        let moments = GroupMoments::of(&tile.clone().cropped(0)?.x, norm.groups)?.pooled();
        let shared = norm.affine(&moments)?;
        let parts = tile.x.dim(0)?;
        self.affines.push(shared.clone());
        Ok(ChannelAffine { scales: shared.scales.repeat(parts), shifts: shared.shifts.repeat(parts) })
    }
}

/// Those that were measured before, while what they should have been is measured: that of all tiles together.
pub(super) struct RemeasuredMoments<'a> {
    /// What each norm goes by, in the order of the decoder.
    pub used: &'a [ChannelAffine],
    /// The moments of the tiles so far, without their margins.
    pub moments: Vec<GroupMoments>,
    /// What each norm does by them.
    pub affines: Vec<ChannelAffine>,
    next: usize,
}

impl<'a> RemeasuredMoments<'a> {
    pub fn new(used: &'a [ChannelAffine]) -> Self {
        Self { used, moments: Vec::new(), affines: used.to_vec(), next: 0 }
    }

    /// Begins with the first norm again, for the next tile.
    pub fn restart(&mut self) -> &mut Self {
        self.next = 0;
        self
    }
}

impl NormMoments for RemeasuredMoments<'_> {
    fn affine(&mut self, norm: &GroupNorm, tile: &PaddedTile) -> Result<ChannelAffine> {
        let index = self.next;
        self.next += 1;
        let Some(used) = self.used.get(index) else { return unmeasured() };
        let own = GroupMoments::of(&tile.clone().cropped(0)?.x, norm.groups)?;
        match self.moments.get_mut(index) {
            Some(moments) => *moments = moments.and(&own)?,
            None => self.moments.push(own),
        }
        self.affines[index] = norm.affine(&self.moments[index])?;
        Ok(used.clone())
    }
}

fn unmeasured<T>() -> Result<T> {
    candle_core::bail!("a group norm whose means and variances were not measured")
}

/// What was measured, for one part after the other.
pub(super) struct KeptMoments<'a>(pub std::slice::Iter<'a, ChannelAffine>);

impl NormMoments for KeptMoments<'_> {
    fn affine(&mut self, _: &GroupNorm, _: &PaddedTile) -> Result<ChannelAffine> {
        match self.0.next() {
            Some(affine) => Ok(affine.clone()),
            None => unmeasured(),
        }
    }
}
