// What the elementwise kernels share: strided rows, the cut into tiles, the choice of a template and the checks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "activations.h"
#include "instruction_set.h"
#include "numbers.h"

namespace lape_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A [T, F] tensor whose last dimension has unit stride; absent if data is null.
template <class Scalar>
struct Rows {
  Scalar* data = nullptr;
  int64_t stride = 0;

  Scalar* operator[](int64_t row) const { return data + row * stride; }
};

// Without entries there is no memory, and so no row to point at.
template <class Scalar>
Rows<const Scalar> rows_of(const std::optional<Tensor>& values) {
  if (!values || values->numel() == 0) return {};
  return {static_cast<const Scalar*>(values->const_data_ptr()), values->stride(0)};
}

template <class Scalar>
Rows<Scalar> mutable_rows_of(const std::optional<Tensor>& values) {
  if (!values || values->numel() == 0) return {};
  return {static_cast<Scalar*>(values->mutable_data_ptr()), values->stride(0)};
}

// h = act(gate) * up for one row; gate, up and h may not overlap.
template <Activation activation, bool gated, class Scalar>
LAPE_INLINE void activate_row(const Scalar* gate, const Scalar* up, Scalar* h, int64_t width) {
  const auto step = [](Wide<Scalar> gate, auto... up) LAPE_INLINE_LAMBDA {
    return (activate<activation>(gate) * ... * up);
  };
  for_units<Scalar>(width, [&]<class Unit>(int64_t first, int64_t units) LAPE_INLINE_LAMBDA {
    const auto* __restrict gates = reinterpret_cast<const Unit*>(gate + first);
    const auto* __restrict ups = reinterpret_cast<const Unit*>(gated ? up + first : nullptr);
    auto* __restrict hs = reinterpret_cast<Unit*>(h + first);
    LAPE_VECTORISE
    for (int64_t unit = 0; unit < units; ++unit) {
      if constexpr (gated) {
        store(map(step, load(gates[unit]), load(ups[unit])), hs[unit]);
      } else {
        store(map(step, load(gates[unit])), hs[unit]);
      }
    }
  });
}

// A [rows, columns] tensor like another one, not filled. torch's own error would not say what it is about.
inline Tensor new_matrix(const char* name, const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t shape[] = {rows, columns};
  try {
    return torch::stable::new_empty(like, {shape, 2});
  } catch (const std::exception&) {
    STD_TORCH_CHECK(false, "No memory could be had for ", name, " of shape [", rows, ", ", columns,
                    "]; pass fewer tokens at a time.");
  }
}

struct Tile {
  int64_t first_row, end_row;        // within [0, T]
  int64_t first_column, end_column;  // within [0, F]
  // Whether another thread may be working on other rows of these columns.
  bool columns_are_shared;
};

enum class Cut { rows_first, columns_first };

// Cuts [T, F] into one tile per thread and runs body(tile) on each. Rows first reads memory in order; columns first
// gives every column one owner as long as there are enough columns.
template <class Body>
void parallel_tiles(int64_t rows, int64_t columns, Cut cut, const Body& body) {
  constexpr int64_t kTooSmallToShare = 1 << 15;
  constexpr int64_t kNarrowestTile = 256;
  constexpr int64_t kColumnMultiple = 64;
  if (rows == 0 || columns == 0) return;
  const int64_t workers = rows * columns < kTooSmallToShare ? 1 : torch::stable::get_num_threads();
  const auto parts_of = [](int64_t length, int64_t part) { return (length + part - 1) / part; };
  int64_t row_parts = 1, column_parts = 1;
  if (cut == Cut::columns_first) {
    column_parts = std::min(workers, parts_of(columns, kNarrowestTile));
    row_parts = std::min(workers / column_parts, rows);
  } else {
    row_parts = std::min(workers, rows);
    column_parts = std::min(workers / row_parts, parts_of(columns, kNarrowestTile));
  }
  const int64_t tile_rows = parts_of(rows, row_parts);
  const int64_t tile_columns = parts_of(parts_of(columns, column_parts), kColumnMultiple) * kColumnMultiple;
  column_parts = parts_of(columns, tile_columns);
  row_parts = parts_of(rows, tile_rows);
  torch::stable::parallel_for(0, row_parts * column_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / column_parts * tile_rows, column = number % column_parts * tile_columns;
      body(Tile{row, std::min(row + tile_rows, rows), column, std::min(column + tile_columns, columns), row_parts > 1});
    }
  });
}

// Calls body.operator()<Scalar>() for the dtype.
template <class Body>
void dispatch_dtype(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body.template operator()<float>();
    case ScalarType::Double: return body.template operator()<double>();
    case ScalarType::BFloat16: return body.template operator()<BFloat16>();
    case ScalarType::Half: return body.template operator()<Half>();
    default: break;
  }
  STD_TORCH_CHECK(false, "The CPU kernels take float32, bfloat16, float16 and float64, but the dtype number is ",
                  static_cast<int>(dtype), "; convert the tensor first.");
}

// Calls body.operator()<Scalar, activation, gated>() for these values.
template <class Body>
void dispatch(ScalarType dtype, int64_t activation, bool gated, const Body& body) {
  const auto with_activation = [&]<class Scalar, Activation chosen>() {
    gated ? body.template operator()<Scalar, chosen, true>() : body.template operator()<Scalar, chosen, false>();
  };
  dispatch_dtype(dtype, [&]<class Scalar>() {
    switch (static_cast<Activation>(activation)) {
      case Activation::silu: return with_activation.template operator()<Scalar, Activation::silu>();
      case Activation::gelu: return with_activation.template operator()<Scalar, Activation::gelu>();
      case Activation::gelu_tanh: return with_activation.template operator()<Scalar, Activation::gelu_tanh>();
      case Activation::relu: return with_activation.template operator()<Scalar, Activation::relu>();
    }
    STD_TORCH_CHECK(false, "The activation number ", activation, " is unknown; it must be 0 to 3.");
  });
}

inline std::string shape_of(const Tensor& values) {
  std::string text = "[";
  for (int64_t dim = 0; dim < values.dim(); ++dim) {
    text += (dim == 0 ? "" : ", ") + std::to_string(values.size(dim));
  }
  return text + "]";
}

// What a tensor reaches in memory.
struct Reach {
  intptr_t begin = 0, end = 0;

  bool meets(const Reach& other) const { return begin < other.end && other.begin < end; }
};

// Throws if the tensor reaches beyond its storage, which Python can shrink or empty behind it, or is not aligned.
inline Reach check_memory(const char* name, const Tensor& values) {
  if (values.numel() == 0) return {};
  const int64_t bytes = values.element_size();
  int64_t entries = 1, stored = 0;
  for (int64_t dim = 0; dim < values.dim(); ++dim) entries += (values.size(dim) - 1) * values.stride(dim);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(values.get(), &stored));
  const int64_t needed = (values.storage_offset() + entries) * bytes;
  STD_TORCH_CHECK(needed <= stored, name, " reaches ", needed, " bytes into a storage of ", stored,
                  "; give the storage its size back first.");
  const auto begin = reinterpret_cast<intptr_t>(values.const_data_ptr());
  STD_TORCH_CHECK(begin % bytes == 0, name, " begins at an address that is no multiple of its ", bytes,
                  " bytes; clone it first.");
  return {begin, begin + entries * bytes};
}

inline void check_rows(const char* name, const Tensor& values, const Tensor& like) {
  STD_TORCH_CHECK(values.is_cpu() && values.dim() == 2 && values.scalar_type() == like.scalar_type() &&
                      values.size(0) == like.size(0) && values.size(1) == like.size(1),
                  name, " must be [T, F] on the CPU with the shape and dtype of gate, ", shape_of(like),
                  ", but its shape is ", shape_of(values), ".");
  STD_TORCH_CHECK(values.size(1) <= 1 || values.stride(1) == 1, name,
                  " must have unit stride in its last dimension, but the stride is ", values.stride(1),
                  "; call .contiguous() first.");
  check_memory(name, values);
}

}  // namespace lape_fast
