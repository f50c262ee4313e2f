//! Packed sequences and views over memory.

use nsa_core::view::{Strided, View, ViewMut};
use nsa_core::{CuSeqlens, DType, LayoutError, NsaConfig, Packing, Seq, ShapeError, index};
use proptest::prelude::*;

const MAX: usize = i32::MAX as usize;

#[test]
fn offsets_are_checked() {
    assert_eq!(CuSeqlens::new(vec![]), Err(LayoutError::Empty));
    assert_eq!(CuSeqlens::new(vec![1, 2]), Err(LayoutError::Start(1)));
    assert_eq!(CuSeqlens::new(vec![-1]), Err(LayoutError::Start(-1)));
    let decreasing = LayoutError::Decreasing { index: 3, value: 4, before: 5 };
    assert_eq!(CuSeqlens::new(vec![0, 2, 5, 4]), Err(decreasing));
    assert_eq!(CuSeqlens::from_lengths([MAX, 1]), Err(LayoutError::TooLong(MAX as u128 + 1)));
    assert_eq!(CuSeqlens::single(usize::MAX), Err(LayoutError::TooLong(usize::MAX as u128)));
    assert_eq!(CuSeqlens::from_lengths([usize::MAX, usize::MAX]), Err(LayoutError::TooLong(usize::MAX as u128)));
    assert_eq!(CuSeqlens::single(MAX).expect("fits").total(), MAX);
    for (error, message) in [
        (LayoutError::Empty, "cu_seqlens is empty: it needs at least the leading 0"),
        (LayoutError::Start(7), "cu_seqlens[0] = 7: it must be 0"),
        (LayoutError::TooLong(1 << 31), "2147483648 packed tokens: offsets are i32, so at most 2147483647 fit"),
    ] {
        assert_eq!(error.to_string(), message);
    }
    let none = CuSeqlens::new(vec![0]).expect("no sequence is legal");
    assert_eq!((none.num_seqs(), none.total()), (0, 0));
}

#[test]
fn offsets_end_at_the_rows() {
    let offsets = CuSeqlens::new(vec![0, 3, 3, 9]).expect("valid");
    assert_eq!(offsets.check_end(9), Ok(()));
    let error = offsets.check_end(10).expect_err("one row more");
    assert_eq!(error.to_string(), "cu_seqlens ends at 9, but the tensors have 10 rows");
}

#[test]
fn contexts_are_checked() {
    let two = CuSeqlens::from_lengths([1, 2]).expect("valid");
    let error = Packing::with_contexts(two.clone(), vec![4]).expect_err("one context for two sequences");
    assert_eq!(error.to_string(), "1 context lengths for 2 sequences");
    assert_eq!(
        Packing::with_contexts(two.clone(), vec![0, MAX - 1]),
        Err(LayoutError::TooLong(MAX as u128 + 1)),
        "the second sequence would end at 2³¹"
    );
    let long = Packing::with_contexts(two.clone(), vec![MAX - 1, MAX - 2]).expect("each fits");
    assert!(matches!(long.cu_keys(), Err(LayoutError::TooLong(_))), "but not both");
    assert!(!long.starts_at_zero() && Packing::new(two).starts_at_zero());
}

proptest! {
    #[test]
    fn packings_say_what_was_packed(seqs in prop::collection::vec((0usize..50, 0usize..100), 0..8)) {
        let (lengths, contexts): (Vec<_>, Vec<_>) = seqs.iter().copied().unzip();
        let offsets = CuSeqlens::from_lengths(lengths.iter().copied()).expect("fits");
        prop_assert_eq!(&CuSeqlens::new(offsets.as_slice().to_vec()), &Ok(offsets.clone()));
        let packing = Packing::with_contexts(offsets.clone(), contexts).expect("fits");
        prop_assert_eq!(packing.num_seqs(), seqs.len());
        prop_assert_eq!(packing.num_tokens(), lengths.iter().sum::<usize>());
        let config = NsaConfig::small();
        let (keys, blocks) = (packing.cu_keys().expect("fits"), packing.cu_blocks(&config).expect("fits"));
        let (mut row, mut key, mut block) = (0, 0, 0);
        for (s, &(length, context)) in seqs.iter().enumerate() {
            prop_assert_eq!(packing.seq(s), Seq { rows: row..row + length, context });
            prop_assert_eq!(packing.seqs().nth(s), Some(packing.seq(s)));
            let end = packing.seq(s).end();
            prop_assert_eq!(end, context + length);
            let count = index::num_blocks(&config, end);
            prop_assert_eq!((keys.range(s), blocks.range(s)), (key..key + end, block..block + count));
            (row, key, block) = (row + length, key + end, block + count);
        }
        prop_assert_eq!((offsets.total(), keys.total(), blocks.total()), (row, key, block));
    }

    #[test]
    fn rows_lie_where_the_strides_say(
        shape in prop::array::uniform3(1usize..5), gaps in prop::array::uniform2(0usize..4), slack in 0usize..3,
    ) {
        let inner = shape[2] + gaps[1];
        let strides = [shape[1] * inner + gaps[0], inner, 1];
        let layout = Strided::new(shape, strides).expect("legal");
        let offset = |i, j, k| i * strides[0] + j * strides[1] + k;
        prop_assert_eq!(layout.reach(), offset(shape[0] - 1, shape[1] - 1, shape[2] - 1) + 1);
        prop_assert_eq!(layout.size(), shape.iter().product::<usize>());
        // Contiguous: the elements in order lie at 0, 1, 2, … .
        let mut offsets = Vec::new();
        for i in 0..shape[0] {
            for j in 0..shape[1] {
                offsets.extend((0..shape[2]).map(|k| offset(i, j, k)));
            }
        }
        prop_assert_eq!(layout.is_contiguous(), offsets.iter().copied().eq(0..layout.size()));
        let data: Vec<usize> = (0..layout.reach() + slack).collect();
        prop_assert!(View::with_layout(&data[..layout.reach() - 1], layout).is_err());
        let view = View::with_layout(&data, layout).expect("fits");
        let rows = (0..shape[0]).flat_map(|i| (0..shape[1]).map(move |j| view.row(i, j)));
        let read: Vec<usize> = rows.flatten().copied().collect();
        prop_assert_eq!(read, offsets);
        let plane = Strided::new([shape[1], shape[2]], [inner, 1]).expect("legal");
        let plane = View::with_layout(&data, plane).expect("fits");
        for j in 0..shape[1] {
            prop_assert_eq!(plane.row(j), view.row(0, j));
        }
    }
}

#[track_caller]
fn view_error<T: std::fmt::Debug>(result: Result<T, ShapeError>, rule: &str) {
    let error = result.expect_err(rule).to_string();
    assert!(error.contains(rule), "`{error}` does not say `{rule}`");
}

#[test]
fn illegal_layouts_are_errors() {
    let huge = usize::MAX / 2 + 1;
    view_error(Strided::contiguous([huge, 2]), "the number of elements overflows");
    view_error(Strided::new([2, 3], [3, 2]), "the innermost dimension must be contiguous");
    view_error(Strided::new([3, 1], [huge, 1]), "the reach overflows");
    view_error(Strided::new([2, 2], [usize::MAX, 1]), "the reach overflows");
    view_error(Strided::new([huge, 2], [0, 1]), "the number of elements overflows");
    let data = [0.0_f32; 5];
    view_error(View::new(&data, [2, 3]), "it reaches beyond the memory");
    view_error(ViewMut::new(&mut [0.0_f32; 5], [2, 3]), "it reaches beyond the memory");
    let error = View::with_layout(&data, Strided::new([2, 2], [4, 1]).expect("legal")).expect_err("6 elements");
    assert_eq!(
        error.to_string(),
        "view of shape [2, 2] with strides [4, 1] does not fit 5 elements: it reaches beyond the memory"
    );
}

#[test]
fn degenerate_layouts_are_legal() {
    let empty = Strided::new([usize::MAX, 0, usize::MAX], [usize::MAX, usize::MAX, 1]).expect("no element");
    assert_eq!((empty.size(), empty.reach(), empty.is_contiguous()), (0, 0, true));
    assert!(View::<f32, 3>::with_layout(&[], empty).is_ok());
    // The stride of a dimension of size 1 says nothing.
    assert!(Strided::new([3, 1, 4], [4, 99, 1]).expect("legal").is_contiguous());
    assert!(Strided::new([4, 1], [1, 7]).expect("one column").is_contiguous());
    // One row for all: legal, not contiguous.
    let repeated = Strided::new([3, 2], [0, 1]).expect("legal");
    assert_eq!((repeated.reach(), repeated.is_contiguous()), (2, false));
    assert_eq!(View::with_layout(&[1, 2], repeated).expect("fits").row(2), [1, 2]);
}

#[test]
fn writable_views_take_the_first_elements() {
    let mut data = [0; 7];
    let mut view = ViewMut::new(&mut data, [2, 3]).expect("fits");
    view.reborrow().data()[5] = 5;
    assert_eq!((view.shape(), view.data().len()), ([2, 3], 6));
    view.into_data()[0] = 1;
    assert_eq!(data, [1, 0, 0, 0, 0, 5, 0]);
}

#[test]
fn shapes_and_dtypes_are_named() {
    assert_eq!(ShapeError::check("slc", "k", &[4, 2], &[4, 2]), Ok(()));
    let error = ShapeError::check("slc", "k", &[4, 2], &[4, 3]).expect_err("another shape");
    assert_eq!(error.to_string(), "slc: `k` has shape [4, 3], expected [4, 2]");
    let error = ShapeError::DType { op: "slc", arg: "v".to_owned(), expected: "f32".to_owned(), got: DType::F16 };
    assert_eq!(error.to_string(), "slc: `v` has dtype f16, expected f32");
}
