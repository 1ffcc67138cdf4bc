// Float weights as their products are made of: floats, or pairs of bfloat16. Others are widened on the way.
#include "linear.h"

namespace {

template <class Kind, class T, int M, int N>
void tiles_of(const LinearArgs& a, Rows x, int64_t row, int64_t tile, int64_t steps) {
    F sum[M][N];
    EACH(m, M)
        EACH(n, N) sum[m][n] = zero();
    int64_t bytes = steps * STEP;
    block<Kind>(sum, x.at, x.stride, (const char*)a.tiles + tile * bytes, bytes, steps);
    EACH(n, N) {
        int64_t column = (tile + n) * TILE, left = a.outputs - column;
        F bias = a.bias ? load((const T*)a.bias + column, left) : zero();
        EACH(m, M) store((T*)a.out + (row + m) * a.outputs + column, sum[m][n] + bias, left);
    }
}

template <class Kind, class T, int M> void columns(const LinearArgs& a, Rows x, int64_t row, int64_t tile, int64_t tiles) {
    int64_t steps = Kind::steps(a.inputs), n = 0;
    for (; n + COLUMNS <= tiles; n += COLUMNS) tiles_of<Kind, T, M, COLUMNS>(a, x, row, tile + n, steps);
    for (; n < tiles; n++) tiles_of<Kind, T, M, 1>(a, x, row, tile + n, steps);
}

template <class Kind, class T> void linear(const LinearArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    int64_t blocks = (rows + ROWS - 1) / ROWS, wide = Kind::steps(a.inputs) * Kind::INPUTS;
    for (int64_t b = 0; b < blocks; b++) {  // blocks of nearly equal height: 8 rows are 4 + 4, not 6 + 2
        int64_t from = row + rows * b / blocks, to = row + rows * (b + 1) / blocks;
        Rows x = prepare<Kind>((const T*)a.x + from * a.x_stride, a.x_stride, a.inputs, wide, to - from);
#define COLUMNS_OF(m) columns<Kind, T, m>(a, x, from, tile, tiles)
        EACH_HEIGHT(to - from, COLUMNS_OF)
    }
}

}  // namespace

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
void JOIN(widened, TUILI_ISA)(const QuantizedArgs&, int64_t, int64_t, int64_t, int64_t);

void JOIN(linear, TUILI_ISA)(const LinearArgs& a, int64_t row, int64_t rows, int64_t tile, int64_t tiles) {
    if (a.dtype == FLOAT32 && a.numbers == FLOAT32) return linear<Float, float>(a, row, rows, tile, tiles);
#ifdef __AVX512F__
    if (a.dtype == BFLOAT16) return linear<Half, uint16_t>(a, row, rows, tile, tiles);
#endif
    QuantizedArgs wide = {};
    wide.x = a.x, wide.tiles = a.tiles, wide.bias = a.bias, wide.out = a.out, wide.x_stride = a.x_stride;
    wide.dtype = a.dtype, wide.inputs = a.inputs, wide.outputs = a.outputs, wide.rows = a.rows;
    wide.numbers = a.numbers, wide.group = 2;  // tiles are of whole pairs
    JOIN(widened, TUILI_ISA)(wide, row, rows, tile, tiles);
}
