//! What attention allocates, by a counting allocator: nothing tile by tile, and no more than tokens ask for.
#![allow(clippy::unwrap_used)] // A failed test says where.

use candle_core::{DType, Device, Tensor};
use clearform_attention::{Attention, AttentionPlan, Geometry, Qkv, TokenGrid};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator, which counts what it is asked for.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Relaxed);
        PEAK.fetch_max(HELD.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Call {
    attention: Box<dyn Attention>,
    image: Qkv,
    text: Qkv,
    geometry: Geometry,
}

const HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const TEXT: usize = 40;

impl Call {
    fn new(side: usize) -> Self {
        let plan: AttentionPlan = "clear:r=4".parse().unwrap();
        let random = |tokens: usize| {
            let one = || Tensor::randn(0f32, 1.0, (1, tokens, HEADS, HEAD_DIM), &Device::Cpu).unwrap();
            Qkv { query: one(), key: one(), value: one() }
        };
        Self {
            attention: plan.build("layer", &|_: &str| Ok(None)).unwrap(),
            image: random(side * side),
            text: random(TEXT),
            geometry: Geometry::new(vec![TokenGrid::new(side, side).unwrap()]),
        }
    }

    fn attend(&self) -> Tensor {
        self.attention.attend(&self.image, Some(&self.text), &self.geometry).unwrap().image
    }

    /// Allocations and the most bytes held at once in a call after the first, which makes the lists.
    fn counted(&self) -> [usize; 2] {
        self.attend();
        let (calls, held) = (CALLS.load(Relaxed), HELD.load(Relaxed));
        PEAK.store(held, Relaxed);
        assert_eq!(self.attend().dtype(), DType::F32);
        [CALLS.load(Relaxed) - calls, PEAK.load(Relaxed) - held]
    }
}

/// One test, since the counts are of the whole process.
#[test]
fn a_layer_allocates_nothing_by_tiles_and_holds_no_more_than_its_tokens() {
    // Each thread has working memory of its own.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let [[small_calls, _], [calls, bytes]] = [16, 96].map(|side| pool.install(|| Call::new(side).counted()));
    // 36 times the tiles; a few more, where queues of threads grow.
    assert!(calls < small_calls + 60, "{calls} allocations, {small_calls} with a 36th of the tiles");
    let numbers = (96 * 96 + TEXT) * HEAD_DIM * 4;
    // Queries, keys, values and the output of all heads, keys and values of one head once more, and scales and lists.
    let most = numbers * (4 * HEADS + 2) + numbers;
    assert!(bytes < most, "{bytes} bytes held at once, expected up to {most}");
}
