"""A product over 8 terms, which tensor cores do not take and the interpreter does."""

import compile_cases

cases = compile_cases.Rejected.cases
