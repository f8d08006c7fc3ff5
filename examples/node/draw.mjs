// Draws a picture with Darkroom from Node.js: one call of RouterService.Generate, as any language with gRPC can make it.

import { writeFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const USAGE = `usage: node draw.mjs PROMPT [options]

  --router HOST:PORT   the router; default $DARKROOM_ROUTER, or 127.0.0.1:7600
  --model ID           the model; default: the router's own
  --steps COUNT        denoising steps; default: the model's own
  --seed NUMBER        the noise's seed; default: random
  --timeout SECONDS    how long the call may take; default 120
  --out FILE           where the picture goes; default picture.png`;

const OPTIONS = {
  router: { type: 'string', default: process.env.DARKROOM_ROUTER || '127.0.0.1:7600' },
  model: { type: 'string' },
  steps: { type: 'string' },
  seed: { type: 'string' },
  timeout: { type: 'string', default: '120' },
  out: { type: 'string', default: 'picture.png' },
};

const PROTOS = fileURLToPath(new URL('../../protos', import.meta.url));
const MAX_MESSAGE_BYTES = 32 * 1024 * 1024;

// google.rpc.Status, as far as it is read here: the details that Darkroom attaches to an error.
const { Status, ErrorInfo } = protoLoader.fromJSON({
  nested: {
    Any: { fields: { type_url: { id: 1, type: 'string' }, value: { id: 2, type: 'bytes' } } },
    Status: { fields: { details: { id: 3, type: 'Any', rule: 'repeated' } } },
    ErrorInfo: { fields: { reason: { id: 1, type: 'string' } } },
  },
}, { keepCase: true, defaults: true });

function describe(error) {
  if (!error.metadata) return error.message;
  const [status] = error.metadata.get('grpc-status-details-bin');
  const info = status && Status.deserialize(status).details.find((detail) => detail.type_url.endsWith('/google.rpc.ErrorInfo'));
  const reason = info ? ` (reason ${ErrorInfo.deserialize(info.value).reason})` : '';
  return `${grpc.status[error.code]}${reason}: ${error.details}`;
}

function connect(address) {
  const definition = protoLoader.loadSync('darkroom/v1/router.proto', {
    includeDirs: [PROTOS], keepCase: true, longs: String, oneofs: true,
  });
  const { RouterService } = grpc.loadPackageDefinition(definition).darkroom.v1;
  return new RouterService(address, grpc.credentials.createInsecure(), {
    'grpc.max_receive_message_length': MAX_MESSAGE_BYTES,
  });
}

async function draw(client, request, deadline) {
  for await (const { node_started: started, node_progress: progress, result } of client.Generate(request, { deadline })) {
    if (started) console.log(`${started.node_id}: on replica ${started.replica_id}`);
    if (progress) console.log(`${progress.node_id}: step ${progress.step} of ${progress.step_count}`);
    if (result) return result;
  }
  throw new Error('the router ended the stream without a result');
}

function readArguments() {
  const { values, positionals } = parseArgs({ options: OPTIONS, allowPositionals: true });
  if (positionals.length !== 1) throw new Error(`exactly one prompt is needed, not ${positionals.length}`);
  for (const name of ['steps', 'seed', 'timeout']) {
    if (!/^\d*$/.test(values[name] ?? '')) throw new Error(`--${name} must be a whole number, not ${values[name]}`);
  }
  return { ...values, prompt: positionals[0] };
}

async function main({ prompt, router, model, steps, seed, timeout, out }) {
  const client = connect(router);
  try {
    const request = { prompt, model_id: model, step_count: steps, seed };
    const result = await draw(client, request, new Date(Date.now() + timeout * 1000));
    const [image] = result.images;
    writeFileSync(out, image.data);
    console.log(`${out}: ${image.width_px} x ${image.height_px} px, seed ${result.seed}`);
  } finally {
    client.close();
  }
}

let options;
try {
  options = readArguments();
} catch (error) {
  console.error(`${error.message}\n\n${USAGE}`);
  process.exit(2);
}
try {
  await main(options);
} catch (error) {
  console.error(describe(error));
  process.exitCode = 1;
}
