// What XLA calls: the handlers of the kernels.

#ifndef RNNATTN_HANDLERS_H_
#define RNNATTN_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace rnnattn {

XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_attention_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_attention_paged_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_attention_backward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_lstm_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_lstm_backward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_gru_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_gru_backward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_rnn_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_rnn_backward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_linear_forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(rnnattn_linear_backward);

}  // namespace rnnattn

#endif  // RNNATTN_HANDLERS_H_
