// What the operator wrappers know of the kernels: argument records and, per instruction set and dtype, a row of function
// pointers. Every kernel is serial over the half-open range it is given; the wrappers do the threading.
//
// Shapes: rows x width, row-major, `stride` elements apart where given. `A` below is the accumulation type: float, or
// double for double input. Pointers named after parameters (weight, bias) are always in A.
#pragma once

#include "types.h"

namespace mlm {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // drop where a 32-bit random number is below this; 0 = keep all
  double scale = 1.0;      // 1 / (1 - p)
};

struct NormForward {
  const void* x;
  const void* residual;   // residual form only, else null
  const void* pre_bias;   // A[width] added to x before dropout, or null
  const void* weight;     // A[width]
  const void* bias;       // A[width] or null
  void* total;            // dropout(x + pre_bias) + residual, else null
  void* out;
  void* mean;             // A[rows], null for RMS norm
  void* rstd;             // A[rows]
  int64_t width;
  double eps;
  bool rms;
  bool stream;            // non-temporal stores
  Dropout dropout;
};

struct NormBackward {
  const void* grad;           // of the normed output
  const void* grad_total;     // of new_residual, or null
  const void* x;              // input of the norm
  const void* weight;
  const void* mean;
  const void* rstd;
  void* dx;                   // gradient of the norm's input, grad_total included
  void* dbranch;              // gradient behind the dropout, or null
  void* dweight;              // A[blocks, width]
  void* dbias;                // A[blocks, width] or null
  void* dpre_bias;            // A[blocks, width] or null
  int64_t rows;
  int64_t width;
  int64_t rows_per_block;
  bool rms;
  bool stream;
  Dropout dropout;
};

enum MaskKind : int { kNoMask = 0, kBoolMask = 1, kFloatMask = 2, kSameMask = 3 };
constexpr int kMaxDims = 8;

struct SoftmaxForward {
  const void* x;
  void* out;
  void* probs;   // before dropout; null without dropout
  const void* mask;
  int mask_kind;                  // kFloatMask: A values, kSameMask: dtype of x
  int dims;                       // leading dimensions of x
  int64_t sizes[kMaxDims];        // of the leading dimensions
  int64_t mask_strides[kMaxDims];
  int64_t mask_key_stride;        // 1 or 0
  int64_t queries;
  int64_t keys;
  double scale;
  bool causal;
  int64_t offset;
  int64_t window;                 // keys seen per query, counting itself; a huge number when there is no window
  bool stream;
  Dropout dropout;
};

struct SoftmaxBackward {
  const void* grad;
  const void* probs;
  void* dx;
  int64_t queries;
  int64_t keys;
  double scale;
  bool causal;
  int64_t offset;
  int64_t window;
  bool stream;
  Dropout dropout;
};

struct Activation {
  const void* x;
  const void* bias;   // A[width] or null
  const void* grad;   // backward only
  void* out;          // forward: activation, backward: gradient of x
  void* dbias;        // backward: A[blocks, width] or null
  int64_t rows;
  int64_t width;      // of the output of swiglu (x is twice as wide), of both for gelu
  int64_t rows_per_block;
  bool stream;
};

struct CrossEntropy {
  void* logits;
  const int64_t* labels;
  float* maximum;       // stats
  float* sum;           // stats
  float* target;        // stats
  const float* lse;     // grad
  const float* scale;   // grad
  int64_t stride;
  int64_t width;
  int64_t num_valid;
  int64_t vocab_start;
};

struct AdamW {
  float* master;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;       // or null
  int copy_dtype;
  float decay;      // 1 - lr * weight_decay
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float step_size;      // lr / (1 - beta1^step)
  float inv_sqrt_bias2; // 1 / sqrt(1 - beta2^step)
  float eps;
  float grad_scale;
};

// A few vectors times a matrix, as in decoding: y (+)= scale * (x weight^T) + bias.
struct Product {
  const void* weight;  // [out or more, in]
  const float* scale;  // [out] of an int8 weight, else null and 1
  const void* bias;    // dtype of the model, or null
  const void* x;       // A[vectors, in]
  void* y;             // A[vectors, out]
  int64_t vectors;
  int64_t in;
  int64_t out;
  bool add;            // to what y holds
};

// One query a row over its cached keys; the row's new key and value are stored first.
struct DecodeAttention {
  const void* qkv;     // A[rows, heads + 2 groups, dim]
  void* keys;          // [slots, groups, capacity, dim]
  void* values;
  const int64_t* positions;  // of the new token of each row
  void* out;           // A[rows, heads, dim]
  int64_t heads;
  int64_t groups;
  int64_t dim;
  int64_t capacity;
  double scale;
};

// Where the rows [samples, heads, rows, width] of a tensor are; each row is packed. Strides in elements.
struct Strided {
  const void* data;
  int64_t sample;
  int64_t head;
  int64_t row;
};

constexpr int64_t kPanel = 64;  // keys that are multiplied together, and queries

// Attention over runs of keys. An item is a segment of queries of one head, see kernels/interval_attention.h; items of a
// phase are `phases` segments apart.
struct IntervalAttention {
  Strided query;
  Strided key;
  Strided value;
  Strided grad;            // backward only
  void* out;               // [samples, heads, queries, dim]: forward's result, backward's gradient of the query
  void* lse;               // [samples, heads, queries]: log of the sum of exponentials, written forward, read backward
  void* dkey;              // [samples, groups, keys, dim], added to
  void* dvalue;
  const int64_t* begin;    // [samples or 1, queries]: first key a query sees
  const int64_t* end;      // one after the last
  int64_t interval_stride; // queries, or 0 where all samples share a row
  int64_t samples;
  int64_t heads;
  int64_t groups;
  int64_t queries;
  int64_t keys;
  int64_t dim;             // a multiple of 16
  double scale;
  int64_t segment;         // queries of an item
  int64_t phase;
  int64_t phases;
  int64_t items_a_head;    // of this phase
  int64_t heads_a_sample;  // that items are of: heads forward, groups backward
};

struct TypeKernels {
  void (*norm_forward)(const NormForward&, int64_t begin, int64_t end);        // rows
  void (*norm_backward)(const NormBackward&, int64_t begin, int64_t end);      // blocks of rows
  void (*softmax_forward)(const SoftmaxForward&, int64_t begin, int64_t end);  // rows
  void (*softmax_backward)(const SoftmaxBackward&, int64_t begin, int64_t end);
  void (*gelu_forward)(const Activation&, int64_t begin, int64_t end);         // rows
  void (*gelu_backward)(const Activation&, int64_t begin, int64_t end);        // blocks of rows
  void (*swiglu_forward)(const Activation&, int64_t begin, int64_t end);       // rows
  void (*swiglu_backward)(const Activation&, int64_t begin, int64_t end);      // rows
  void (*cross_entropy_stats)(const CrossEntropy&, int64_t begin, int64_t end);
  void (*cross_entropy_grad)(const CrossEntropy&, int64_t begin, int64_t end);
  void (*adamw)(const AdamW&, int64_t begin, int64_t end);                     // elements; dtype of the gradient
  void (*widen)(const void* from, void* to, int64_t count);                    // dtype -> A
  void (*sum_blocks)(const void* from, void* to, int64_t blocks, int64_t width, int64_t begin, int64_t end);  // A -> dtype
  void (*product)(const Product&, int64_t begin, int64_t end);                    // outputs
  void (*product_int8)(const Product&, int64_t begin, int64_t end);               // outputs; not for double
  void (*decode_attention)(const DecodeAttention&, int64_t begin, int64_t end);   // rows x groups
  void (*sum_parts)(const void* const* parts, int64_t count, void* to, int64_t length);  // in order, into dtype
  void (*interval_attention_forward)(const IntervalAttention&, int64_t begin, int64_t end);   // items; float and double
  void (*interval_attention_backward)(const IntervalAttention&, int64_t begin, int64_t end);
};

struct Kernels {
  int level;  // 0 plain, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16
  TypeKernels types[kNumDTypes];
};

namespace avx512bf16 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace plain {
const Kernels& kernels();
}

// The best table this processor can run; MLM_CPU_ISA=avx512|avx2|plain asks for a lower one.
const Kernels& active();

}  // namespace mlm
